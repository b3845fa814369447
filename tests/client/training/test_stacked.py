from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import classes_study, labels_study, masks_study, site_data

from medfl.client.data.splits import Split
from medfl.client.training.local import Given, train_local
from medfl.client.training.plain import round_generator
from medfl.client.training.stacked import can_stack, same_shapes, train_stacked
from medfl.client.workbench import make_bench
from medfl.shared.study import Study

CPU = torch.device("cpu")
UNET = {"name": "unet", "channels": [4, 8], "residual_units": 1}
SGD = {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 3}
STUDIES = {
    "sgd with momentum": classes_study(training={"batch_size": 3, "steps": 5, "momentum": 0.9, "weight_decay": 0.01}),
    "an uneven last batch, twice": classes_study(training={"batch_size": 3, "steps": None, "epochs": 2}),
    "adam": classes_study(training={"optimizer": "adam", "learning_rate": 0.01}),
    "masks": masks_study(model={**UNET, "norm": "instance"}, training=SGD),
    "group norm": masks_study(model={**UNET, "norm": "group"}, training=SGD),
    "several labels": labels_study(),
    "the proximal term": classes_study(strategy={"name": "fedprox", "mu": 0.5}, training={"steps": 4}),
    "augmentation": masks_study(data={"augmentation": {"flip": True, "noise": 0.1}}, training=SGD),
}


@pytest.mark.parametrize("name", list(STUDIES))
def test_stacked_sites_get_what_each_gets_by_itself(name: str) -> None:
    study = STUDIES[name]
    bench = make_bench(study, CPU)
    weights = bench.layout.flatten(bench.network.state_dict())
    given = Given(weights, weights[:0], None)
    sets = [site_data(study, seed=n).splits[Split.TRAIN] for n in range(3)]
    assert can_stack(study, bench.network)
    generators = [round_generator(study, str(n), 1, CPU) for n in range(3)]
    together = train_stacked(bench, sets, study, given, generators=generators, round_number=1)
    for n, (data, mine) in enumerate(zip(sets, together, strict=True)):
        bench.load(weights, None)
        alone = train_local(bench, data, study, given, generator=round_generator(study, str(n), 1, CPU), round_number=1)
        assert np.abs(alone.update).max() > 1e-3
        assert np.abs(mine.update - alone.update).max() < 1e-6
        assert mine.tally == pytest.approx(alone.tally, rel=1e-5)


@pytest.mark.parametrize(
    "study",
    [
        masks_study(model={**UNET, "norm": "batch"}),
        masks_study(model={**UNET, "dropout": 0.5}),
        classes_study(strategy={"name": "scaffold"}),
        masks_study(training={"train_only": "head"}),
    ],
    ids=["running statistics", "dropout", "memory at sites", "frozen layers"],
)
def test_what_does_not_stack_is_known(study: Study) -> None:
    assert not can_stack(study, make_bench(study, CPU).network)


def test_sites_of_other_sizes_are_other_shapes() -> None:
    few, many = (site_data(classes_study(), patients=n).splits[Split.TRAIN] for n in (3, 7))
    assert same_shapes(few, few)
    assert not same_shapes(few, many)
