"""A study that trains the last layer only: what travels, what stays as it was, with and without privacy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import masks_study, site_data

from medfl.client.workbench import make_bench
from medfl.server.rounds import Ending
from medfl.shared.algorithms.travel import build_study_network
from medfl.simulations.federation import federate

PRIVATE: dict[str, Any] = {
    "mode": "dp-sgd",
    "epsilon": 50,
    "delta": 1e-2,
    "noise_multiplier": 1.0,
    "expected_batch": 2,
    "steps_per_round": 2,
}


@pytest.mark.parametrize("images", [1, 2])  # one backward pass for all patients, and one for each
@pytest.mark.parametrize("privacy", [{"mode": "none"}, PRIVATE], ids=["plain", "private"])
def test_the_head_moves_and_everything_else_stays(privacy: dict[str, Any], images: int) -> None:
    study = masks_study(training={"train_only": "head"}, privacy=privacy)
    federation = federate(study, {f"site-{n}": site_data(study, seed=n, images=images) for n in range(2)})
    result = federation.result
    assert result.ending is Ending.DONE
    start = build_study_network(study)
    assert np.abs(result.weights - result.layout.flatten(start.state_dict())).max() > 0
    assert result.layout.length < 0.5 * sum(parameter.numel() for parameter in start.parameters())
    bench = make_bench(study, torch.device("cpu"))
    bench.load(result.weights, None)
    head = {name for name, _ in result.layout.tensors}
    for name, value in bench.network.state_dict().items():
        assert torch.equal(value, start.state_dict()[name]) is (name not in head)
