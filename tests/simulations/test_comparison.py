"""Intervals and paired tests against numbers from tables."""

from __future__ import annotations

import math

import pytest

from medfl.simulations.comparison import interval, paired


def test_the_interval_of_three_values_uses_students_t() -> None:
    # mean 0.7, deviation 0.1, t(0.975, 2) = 4.3027: 4.3027 * 0.1 / sqrt(3) = 0.2484
    found = interval([0.6, 0.7, 0.8])
    assert (found.mean, found.half_width) == (pytest.approx(0.7), pytest.approx(0.2484, abs=1e-4))
    assert str(found) == "0.700 ± 0.248"


def test_one_or_two_values_have_no_interval_and_no_value_says_so() -> None:
    assert str(interval([0.5])) == "0.500"
    assert str(interval([0.4, 0.6])) == "0.500"
    assert str(interval([math.nan])) == "no score"
    assert str(interval([])) == "no score"
    assert str(interval([0.4, math.nan, 0.6, 0.5])) == "no score"


def test_six_better_pairs_have_the_smallest_possible_p() -> None:
    reference = {("a", seed): 0.5 for seed in range(6)}
    method = {("a", seed): 0.5 + 0.01 * (seed + 1) for seed in range(6)}
    found = paired(method, reference)
    assert found.p == pytest.approx(2 / 2**6)  # all signs equal, either way
    assert (found.difference, found.pairs, found.better) == (pytest.approx(0.035), 6, 1)


def test_few_pairs_have_a_difference_and_no_p() -> None:
    found = paired({("a", 0): 0.6, ("b", 0): 0.3}, {("a", 0): 0.5, ("b", 0): 0.5, ("c", 0): 1.0})
    assert math.isnan(found.p)
    assert (found.difference, found.pairs, found.better) == (pytest.approx(-0.05), 2, 1)
    assert found.sites == 2  # c is not compared


def test_a_pair_without_a_score_is_left_out() -> None:
    assert paired({("a", 0): math.nan}, {("a", 0): 0.5}).pairs == 0


def test_equal_methods_are_not_told_apart() -> None:
    scores = {("a", seed): 0.5 for seed in range(8)}
    assert math.isnan(paired(scores, scores).p)
