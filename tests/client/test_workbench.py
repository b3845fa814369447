from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import classes_study, masks_study

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
