"""A study that trains few layers, from given weights: what travels, what stays as it was, with and without privacy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from tiny import masks_study, site_data

from medfl.client.workbench import make_bench
from medfl.server.checkpoint import save_model
from medfl.server.ending import Ending
from medfl.shared.algorithms.travel import build_study_network
from medfl.shared.initial_weights import digest_of, load_initial, shelve
from medfl.simulations.baselines import initial_model
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


@pytest.mark.parametrize("train_only", ["all", "head", "adapters"])
@pytest.mark.parametrize("privacy", [{"mode": "none"}, PRIVATE], ids=["plain", "private"])
def test_a_study_goes_on_from_another_ones_model(train_only: str, privacy: dict[str, Any], tmp_path: Path) -> None:
    before = masks_study(model={"name": "unet", "channels": [4, 8], "residual_units": 1, "norm": "group"})
    plain = build_study_network(before)
    given = {name: tensor + 0.01 for name, tensor in plain.state_dict().items()}
    content = save(given)
    study = before.model_copy(
        update={
            "initial_weights": digest_of(content),
            "training": before.training.model_copy(update={"train_only": train_only, "adapter_rank": 2}),
            "privacy": masks_study(privacy=privacy).privacy,
        }
    )
    sites = {f"site-{n}": site_data(study, seed=n, images=1) for n in range(2)}
    shelve(content)
    if train_only == "all":  # what simulations score as "before training"
        begins_with = initial_model(study, torch.device("cpu"))
        assert np.array_equal(begins_with, np.concatenate([tensor.numpy().ravel() for tensor in given.values()]))
    result = federate(study, sites).result
    assert result.ending is Ending.DONE
    save_model(tmp_path / "model.safetensors", study, result.layout, result.weights, round_number=2)
    # The finished model is a plain network, whatever was trained in it: it can be the next study's beginning.
    made = load_file(tmp_path / "model.safetensors")
    load_initial((tmp_path / "model.safetensors").read_bytes(), plain)
    moved = {name for name, tensor in made.items() if not torch.equal(tensor, given[name])}
    head = {name for name in made if name.startswith(next(reversed(made)).rpartition(".")[0])}
    assert moved
    assert all(float((made[name] - given[name]).abs().max()) < 0.5 for name in made)
    if train_only == "head":
        assert moved == head
    if train_only == "adapters":
        assert "model.2.0.conv.weight" not in moved  # a transposed convolution has no adapter
        assert head < moved < set(made)


def test_only_adapters_norms_and_the_head_travel() -> None:
    study = masks_study(
        model={"name": "unet", "channels": [8, 16], "residual_units": 1, "norm": "group"},
        training={"train_only": "adapters", "adapter_rank": 2},
    )
    bench = make_bench(study, torch.device("cpu"))
    kinds = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in bench.layout.tensors}
    assert {"down", "up"} <= kinds
    assert bench.layout.length < 0.5 * sum(parameter.numel() for parameter in bench.network.parameters())
