"""The site's half of an algorithm, where whole federations do not show it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tiny import masks_study, site_data

from medfl.client.data.splits import Split
from medfl.client.data.tensors import TensorSet
from medfl.client.training.local import Given, train_local
from medfl.client.training.plain import round_generator
from medfl.client.workbench import Bench, make_bench
from medfl.shared.algorithms.moon import Representation
from medfl.shared.weights import Flat

CPU = torch.device("cpu")


def represented(bench: Bench, weights: Flat, data: TensorSet) -> torch.Tensor:
    bench.load(weights, None)
    watched = Representation(bench.network)
    with torch.no_grad():
        bench.network.eval()(data.inputs(torch.arange(len(data))))
    watched.close()
    return watched.take()


def margin(strategy: dict[str, Any]) -> float:
    """How much nearer a site's representations are to the global model's than to its last own, over three rounds."""
    steps = {"steps": 20, "epochs": None, "learning_rate": 0.02, "batch_size": 8}
    study = masks_study(strategy=strategy, training=steps)
    bench = make_bench(study, CPU)
    sites = [site_data(study, seed=number).splits[Split.TRAIN] for number in range(2)]
    weights = bench.layout.flatten(bench.network.state_dict())
    kept: list[Flat | None] = [None, None]
    last: list[Flat] = []
    margins = []
    for number in range(1, 5):
        updates = []
        for place, data in enumerate(sites):
            bench.load(weights, None)
            given = Given(weights, np.zeros(0, np.float32), kept[place])
            generator = round_generator(study, f"site {place}", number, CPU)
            local = train_local(bench, data, study, given, generator=generator, round_number=number)
            updates.append(local.update)
            kept[place] = local.kept
            if number > 1:
                models = (weights + local.update, weights, last[place])
                mine, globals_, before = (represented(bench, model, data) for model in models)
                near, away = (torch.cosine_similarity(mine, other, dim=1) for other in (globals_, before))
                margins.append(float((near - away).mean()))
        last = [weights + update for update in updates]
        weights = weights + np.mean(updates, axis=0)
    return float(np.mean(margins))


def test_moon_brings_representations_nearer_to_the_global_models_than_to_the_last_own() -> None:
    # The aim of Li et al. 2021, equation 3; without it, neither is nearer.
    assert abs(margin({"name": "fedavg"})) < 0.01
    little, much = margin({"name": "moon", "mu": 1.0}), margin({"name": "moon", "mu": 10.0})
    assert 0.05 < little < much
