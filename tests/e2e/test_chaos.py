"""A short chaos suite: five sites and their coordinator, killed again and again, end with the very same bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chaos import COORDINATOR, EXACT, Disturbed, Found, ended, prepare, studies
from safetensors.numpy import load_file

from medfl.client.config import load_site
from medfl.client.runtime import load_data, site_device
from medfl.simulations.demo import run_folder
from medfl.simulations.federation import federate

pytestmark = [pytest.mark.e2e]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the sites compute: several threads add in another order, and the last bits differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(560)
@pytest.mark.usefixtures("one_thread")
def test_whoever_is_killed_the_model_is_that_of_an_undisturbed_federation_to_the_last_bit(tmp_path: Path) -> None:
    study, found = studies(12)[EXACT], Found()
    places = prepare(tmp_path, [study])
    Disturbed(places, [study], random.Random(7), found).run(pause_s=(0.5, 2.5), limit_s=500, kills=6)
    ended(places, study, found)
    assert found.wrong == []
    assert sum(found.kills.values()) >= 4
    assert found.kills[COORDINATOR] == 1
    made = load_file(run_folder(places, study) / "model.safetensors")

    homes = {name: load_site(places.hospital(name) / "site.yaml") for name in places.names}
    data = {name: load_data(settings, study, site_device(settings)) for name, settings in homes.items()}
    undisturbed = federate(study, data).result
    parts = dict(zip([name for name, _ in undisturbed.layout.tensors], range(10**6), strict=False))
    assert set(made) == set(parts)
    flat = b"".join(made[name].tobytes() for name, _ in undisturbed.layout.tensors)
    assert flat == undisturbed.weights.tobytes()
