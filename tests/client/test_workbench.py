from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from tiny import classes_study, masks_study
from torch.nn import functional

from medfl.client.privacy.bookkeeping.engine import clipped_sum_by_bookkeeping
from medfl.client.privacy.opacus_engine import clipped_sum_by_opacus
from medfl.client.workbench import Workbench, make_bench
from medfl.shared.errors import ProtocolError

CPU = torch.device("cpu")
FEDBN = masks_study(
    strategy={"name": "fedbn"}, model={"name": "unet", "channels": [4, 8], "residual_units": 0, "norm": "group"}
)


def test_a_study_keeps_its_network_and_another_study_takes_its_place() -> None:
    bench = Workbench(CPU)
    first = bench.open(classes_study())
    assert bench.open(classes_study()) is first
    other = bench.open(classes_study(seed=1))
    assert other.network is not first.network
    assert bench.open(classes_study()).network is not first.network


@pytest.mark.parametrize(("device", "kept"), [("cpu", 1), ("meta", 0)])
def test_training_on_a_cpu_keeps_freed_memory(device: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr("medfl.client.workbench.keep_freed_buffers", lambda: told.append(True))
    with suppress(NotImplementedError):  # a meta tensor has no values to begin with
        make_bench(classes_study(), torch.device(device))
    assert len(told) == kept


def test_the_update_is_what_changed() -> None:
    bench = make_bench(classes_study(), CPU)
    weights = np.linspace(0, 1, bench.layout.length, dtype=np.float32)
    bench.load(weights, None)
    assert not bench.update_from(weights).any()
    assert np.array_equal(bench.update_from(weights - 1), np.ones_like(weights) * (weights - (weights - 1)))


def test_personal_tensors_begin_as_the_seed_gives_them_for_every_site() -> None:
    bench = make_bench(FEDBN, CPU)
    zeros = np.zeros(bench.layout.length, np.float32)
    mine = np.full(bench.personal.length, 7, np.float32)
    bench.load(zeros, mine)
    assert np.array_equal(bench.personal_weights(), mine)
    bench.load(zeros, None)
    assert np.array_equal(bench.personal_weights(), bench.initial_personal)


def test_weights_or_personal_tensors_that_do_not_fit_are_refused() -> None:
    bench = make_bench(FEDBN, CPU)
    zeros = np.zeros(bench.layout.length, np.float32)
    with pytest.raises(ProtocolError):
        bench.load(zeros[:-1], None)
    with pytest.raises(ProtocolError):
        bench.load(zeros, np.zeros(1, np.float32))


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_a_network_is_made_ready_for_both_engines_of_private_training_and_the_change_is_told(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As MONAI builds them they work in place, which Opacus' hooks cannot see through."""
    caplog.set_level("INFO", "medfl.site")
    study = classes_study(
        model={"name": name, "norm": "group"},
        data={"preprocessing": {"normalise": "scale_255", "size": [32, 32]}},
        privacy={"mode": "dp-sgd", "epsilon": 4.0, "delta": 1e-6, "unit": "image", "images_per_patient": 1},
    )
    network = make_bench(study, CPU).network
    assert "each no longer works in place" in caplog.text
    draw = torch.Generator().manual_seed(0)
    units = [(torch.randn((1, 1, 32, 32), generator=draw), torch.tensor([row % 2])) for row in range(3)]
    ours = clipped_sum_by_bookkeeping(network, functional.cross_entropy, units, 1.0)
    oracle = clipped_sum_by_opacus(network, functional.cross_entropy, units, 1.0)
    assert torch.allclose(ours.norms, oracle.norms, rtol=1e-4)


def test_a_network_without_privacy_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "medfl.site")
    study = classes_study(
        model={"name": "resnet18"}, data={"preprocessing": {"normalise": "scale_255", "size": [32, 32]}}
    )
    make_bench(study, CPU)
    assert "in place" not in caplog.text
