"""Which model is handed out: numbers that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import classes_study

from medfl.server.checkpoint import CheckpointFolder
from medfl.server.handed_out import HandedOut
from medfl.shared.weights import Flat


def model(value: float) -> Flat:
    return np.full(3, value, np.float32)


def test_the_mean_is_over_the_last_rounds_and_counts_only_once_all_are_there() -> None:
    handed_out = HandedOut(classes_study(rounds={"count": 4, "average_last": 3}), None)
    for number, value in enumerate((100.0, 1.0, 2.0), start=1):
        handed_out.follow(number, model(value))
        assert handed_out.model(number, model(value)).tolist() == model(value).tolist()
    handed_out.follow(4, model(6.0))
    assert handed_out.model(4, model(6.0)) == pytest.approx(3.0)  # (1 + 2 + 6) / 3


def test_without_averaging_it_is_the_newest() -> None:
    handed_out = HandedOut(classes_study(rounds={"count": 2}), None)
    for number in (1, 2):
        handed_out.follow(number, model(number))
    assert handed_out.average is None
    assert handed_out.model(2, model(2)).tolist() == [2.0] * 3


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_best_one_is_kept_with_and_without_a_disk(tmp_path: Path, on_disk: bool) -> None:
    handed_out = HandedOut(classes_study(), CheckpointFolder(tmp_path) if on_disk else None)
    assert handed_out.best(1) is None
    handed_out.keep_best(1, model(5.0))
    kept = handed_out.best(1)
    assert kept is not None
    assert kept.tolist() == [5.0] * 3
