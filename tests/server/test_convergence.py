from __future__ import annotations

import pytest
from tiny import classes_study

from medfl.server.convergence import Best, Convergence
from medfl.shared.study import Converged

SETTINGS = Converged(rounds=3, gain=0.01)


def after(scores: list[float], settings: Converged | None = SETTINGS) -> list[int]:
    """Rounds after which the study counts as converged."""
    watch = Convergence(settings)
    return [n for n, score in enumerate(scores, 1) if watch.note(n, {"dice": score, "loss": -score})]


def test_three_rounds_without_a_gain_are_the_end_and_no_less() -> None:
    assert after([0.5, 0.6, 0.6, 0.6]) == []
    assert after([0.5, 0.6, 0.6, 0.6, 0.6]) == [5]


def test_small_gains_are_none_and_add_up_to_one() -> None:
    assert after([0.5, 0.505, 0.509, 0.5099]) == [4]
    assert after([0.5, 0.505, 0.511, 0.512]) == []


def test_rounds_that_are_not_scored_count_and_end_nothing_themselves() -> None:
    watch = Convergence(SETTINGS)
    watch.note(2, {"dice": 0.5})
    for number in (3, 4, 5, 6):
        assert not watch.note(number, {})
    assert watch.note(8, {"dice": 0.5})


def test_without_the_setting_or_without_scores_nothing_converges() -> None:
    assert after([0.5] * 50, None) == []
    assert not any(Convergence(SETTINGS).note(n, {"loss": 0.5}) for n in range(50))


def test_a_restarted_watch_goes_on_where_it_was() -> None:
    watch = Convergence(SETTINGS, Best(0.6, 2))
    assert not watch.look(4)
    assert watch.note(5, {"dice": 0.6})


def test_it_cannot_be_asked_for_where_no_score_leaves() -> None:
    private = {"mode": "dp-sgd", "epsilon": 8.0}
    with pytest.raises(ValueError, match="no score leaves a site"):
        classes_study(rounds={"converged": {"rounds": 3}}, privacy=private)
