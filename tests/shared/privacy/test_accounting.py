"""Accountants against published tables, against each other, and against closed forms."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from medfl.shared.errors import ConfigError
from medfl.shared.privacy.accounting import (
    SampledGaussian,
    check_delta,
    epsilon,
    merged,
    renyi_epsilon,
    solve_noise_multiplier,
)

DELTA = 1e-5

# Batch 16, 100 epochs, sampling rate 1 / ceil(N / 16), delta 1e-5, by dp-accounting on a grid of 1e-4:
# patients: (steps, epsilon at noise multipliers 0.8, 1, 1.5, 2 by PLD, the same by Renyi).
PUBLISHED = {
    500: (3200, (20.05, 12.35, 6.21, 4.15), (21.8, 13.4, 6.72, 4.50)),
    1000: (6300, (13.31, 8.17, 4.16, 2.81), (14.5, 8.86, 4.51, 3.05)),
    2000: (12500, (8.78, 5.42, 2.80, 1.91), (9.56, 5.88, 3.05, 2.08)),
    5000: (31300, (5.07, 3.17, 1.67, 1.14), (5.53, 3.44, 1.82, 1.25)),
}
ROWS = [
    (SampledGaussian(noise, 1 / math.ceil(patients / 16), steps), tight[column], renyi[column])
    for patients, (steps, tight, renyi) in PUBLISHED.items()
    for column, noise in enumerate((0.8, 1.0, 1.5, 2.0))
]


@pytest.mark.parametrize(("event", "tight", "renyi"), ROWS, ids=lambda value: str(value))
def test_both_accountants_agree_with_the_published_tables(event: SampledGaussian, tight: float, renyi: float) -> None:
    measured = epsilon([event], DELTA)
    assert measured == pytest.approx(tight, rel=0.015)
    assert measured >= tight - 0.005 - 1e-9  # rounded up, never down (the table has two decimals)
    assert renyi_epsilon([event], DELTA) == pytest.approx(renyi, rel=0.01)


@pytest.mark.parametrize(("noise", "expected"), [(1.0, 8.2), (2.0, 2.8)])
def test_a_thousand_patients_in_batches_of_sixteen_for_a_hundred_epochs(noise: float, expected: float) -> None:
    assert round(epsilon([SampledGaussian(noise, 1 / 63, 6300)], DELTA), 1) == expected


@pytest.mark.parametrize(("images", "expected"), [(2, 19.4), (5, 68.9)])
def test_several_images_of_a_patient_cost_the_patient_many_times_more(images: int, expected: float) -> None:
    assert epsilon([SampledGaussian(1.0, 1 / 63, 6300, images)], DELTA) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("patients", "expected"), [(50, 34.0), (100, 22.6), (300, 11.1), (1000, 5.4)])
def test_small_sites_pay_more(patients: int, expected: float) -> None:
    # eight patients a step, 100 epochs (the table rounds their steps to whole epochs), noise multiplier 1
    event = SampledGaussian(1.0, 8 / patients, round(100 * patients / 8))
    assert epsilon([event], DELTA) == pytest.approx(expected, rel=0.03)


@settings(max_examples=15, deadline=None)
@given(noise=st.floats(0.5, 20.0), steps=st.integers(1, 50))
def test_without_sampling_epsilon_is_that_of_the_exact_gaussian_mechanism(noise: float, steps: int) -> None:
    # Balle & Wang 2018, https://arxiv.org/abs/1805.06530, theorem 8, with mu = sqrt(steps) / noise
    mu = math.sqrt(steps) / noise

    def excess(value: float) -> float:
        return float(norm.cdf(mu / 2 - value / mu) - math.exp(value) * norm.cdf(-mu / 2 - value / mu) - DELTA)

    exact = brentq(excess, 0, 200) if excess(0) > 0 else 0.0
    assert exact - 1e-6 <= epsilon([SampledGaussian(noise, 1.0, steps)], DELTA) <= exact * (1 + 1e-6) + 1e-6
    on_the_grid = epsilon([SampledGaussian(noise, 1 - 1e-12, steps)], DELTA)
    assert exact - 1e-6 <= on_the_grid <= exact * 1.01 + 0.01


def test_unsampled_mechanisms_add_up_as_one_gaussian() -> None:
    # 1 / 3^2 + 4 / 4^2 + (2 / 6)^2 = 17 / 36: one release with noise 6 / sqrt(17), no image drawn at random
    parts = [SampledGaussian(3.0, 1.0, 1), SampledGaussian(4.0, 1.0, 4), SampledGaussian(6.0, 1.0, 1, 2)]
    whole = SampledGaussian(6 / math.sqrt(17), 1.0, 1)
    assert epsilon(parts, DELTA) == pytest.approx(epsilon([whole], DELTA), rel=1e-9)


def test_nothing_costs_nothing() -> None:
    assert epsilon([], DELTA) == 0.0
    assert renyi_epsilon([], DELTA) == 0.0


def test_equal_mechanisms_are_added_up_whatever_their_order() -> None:
    a, b = SampledGaussian(1.0, 0.1, 5), SampledGaussian(2.0, 0.1, 5)
    assert merged([a, b, a, b, a]) == [a.times(3), b.times(2)]


def test_a_history_of_many_equal_rounds_costs_what_one_long_round_costs() -> None:
    rounds = [SampledGaussian(1.0, 1 / 63, 63)] * 100
    assert epsilon(rounds, DELTA) == epsilon([SampledGaussian(1.0, 1 / 63, 6300)], DELTA)


def test_different_studies_compose() -> None:
    a, b = SampledGaussian(1.0, 0.05, 200), SampledGaussian(2.0, 0.1, 300)
    both = epsilon([a, b], DELTA)
    assert max(epsilon([a], DELTA), epsilon([b], DELTA)) < both < epsilon([a], DELTA) + epsilon([b], DELTA)
    assert both < renyi_epsilon([a, b], DELTA)


@pytest.mark.parametrize(
    ("target", "expected"), [(8.0, 1.012), (1.0, 4.782)], ids=["epsilon 8", "epsilon 1"]
)  # 1.011 and 4.78 on a five times finer grid
def test_the_solved_noise_is_the_smallest_that_is_enough(target: float, expected: float) -> None:
    noise = solve_noise_multiplier(target, DELTA, sampling_rate=1 / 63, steps=6300)
    assert noise == pytest.approx(expected, abs=0.0015)
    assert epsilon([SampledGaussian(noise, 1 / 63, 6300)], DELTA) <= target
    assert epsilon([SampledGaussian(noise * 0.995, 1 / 63, 6300)], DELTA) > target


def test_a_generous_budget_still_gets_some_noise() -> None:
    assert solve_noise_multiplier(1e4, DELTA, sampling_rate=0.01, steps=1) == 0.2


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_epsilon_is_refused(target: float) -> None:
    with pytest.raises(ConfigError, match="epsilon must be positive"):
        solve_noise_multiplier(target, DELTA, sampling_rate=0.1, steps=10)


def test_an_epsilon_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match="fewer rounds or steps"):
        solve_noise_multiplier(1e-4, DELTA, sampling_rate=1.0, steps=10_000_000)


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, math.inf])
def test_a_mechanism_without_noise_is_refused(noise: float) -> None:
    with pytest.raises(ConfigError, match="noise_multiplier must be positive"):
        SampledGaussian(noise, 0.1, 1)


@pytest.mark.parametrize("rate", [0.0, 1.5, -0.1, math.nan])
def test_a_sampling_rate_that_is_no_probability_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="sampling_rate"):
        SampledGaussian(1.0, rate, 1)


@pytest.mark.parametrize(("steps", "images"), [(0, 1), (1, 0)])
def test_no_steps_and_no_images_are_refused(steps: int, images: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        SampledGaussian(1.0, 0.1, steps, images)


def test_renyi_accounting_bounds_several_images_from_above() -> None:
    event = SampledGaussian(4.0, 1 / 63, 630, 3)
    assert epsilon([event], DELTA) < renyi_epsilon([event], DELTA) < 5 * epsilon([event], DELTA)


def test_a_history_too_large_for_the_grid_is_bounded_by_renyi_accounting() -> None:
    hopeless = SampledGaussian(0.2, 1 - 1e-12, 10_000_000)
    # All but unsampled: the exact epsilon is above mu^2 / 2 with mu = sqrt(steps) / noise, 1.25e8.
    assert epsilon([hopeless], DELTA) == renyi_epsilon([hopeless], DELTA) > 1.25e8


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        check_delta(delta)


def test_delta_above_one_over_the_patients_is_refused_with_a_way_out() -> None:
    check_delta(0.01, patients=100)
    with pytest.raises(ConfigError, match=r"above one over 101 patients: set privacy\.delta to 1e-03 or less"):
        check_delta(0.01, patients=101)
