"""Adaptive clipping beside numbers worked out by hand from Andrew et al. 2021."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfl.shared.errors import ConfigError, ProtocolError
from medfl.shared.privacy.accounting import SampledGaussian, epsilon
from medfl.shared.privacy.adaptive_clip import clip_of, count_noise, next_clip, noise_for_both, number_within
from medfl.shared.privacy.plan import plan_client_level
from medfl.shared.privacy.settings import AdaptiveClip, ClientLevel


def level(**adaptive: float) -> ClientLevel:
    return ClientLevel(
        mode="client-level", epsilon=50, delta=1e-2, clip_norm=2.0, noise_multiplier=1.0, adaptive_clip=adaptive
    )


def moved(clip: float, halves: float, sites: int, **adaptive: float) -> float:
    settings = level(**adaptive)
    return next_clip(clip, halves=halves, sites=sites, settings=settings, adaptive=AdaptiveClip(**adaptive))


@pytest.mark.parametrize(
    ("halves", "expected"),
    [
        (5.0, math.exp(-0.1)),  # all ten within: the share is 1, the clip shrinks by exp(-0.2 * (1 - 0.5))
        (-5.0, math.exp(0.1)),  # none within
        (0.0, 1.0),  # five of ten: where it is wanted
        (3.0, math.exp(-0.06)),  # eight of ten
        (50.0, math.exp(-0.1)),  # nothing but noise: as all ten
    ],
)
def test_the_clip_moves_as_in_the_papers_algorithm(halves: float, expected: float) -> None:
    assert moved(3.0, halves, 10) == pytest.approx(3.0 * expected)


def test_the_clip_comes_to_rest_at_the_quantile_of_the_norms() -> None:
    norms, clip = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0], 0.1
    for _ in range(300):
        halves = sum(0.5 if norm <= clip else -0.5 for norm in norms)
        clip = moved(clip, halves, 10, quantile=0.8)
    assert 7.9 < clip < 8.6  # at the eighth of ten; above it the share is 0.8 and nothing moves


def test_the_clip_stays_within_a_thousand_times_the_studys() -> None:
    assert moved(2000.0, -5.0, 10) == 2000.0
    assert moved(0.002, 5.0, 10) == 0.002


def test_update_and_count_cost_what_the_paper_says_together() -> None:
    # (1 / 1^2 + 1 / (2 * 0.5)^2) ** -0.5
    assert noise_for_both(level(count_noise=0.5)) == pytest.approx(1 / math.sqrt(2))
    # absent, the count has noise of 2, twice the multiplier: (1 + 1/16) ** -0.5
    assert noise_for_both(level()) == pytest.approx(4 / math.sqrt(17))
    assert noise_for_both(level().model_copy(update={"adaptive_clip": None})) == 1.0


def test_the_accountant_agrees_that_two_gaussians_are_one() -> None:
    settings = level(count_noise=1.5)
    # the count's parts are -1/2 and 1/2: with or without a site it moves by 1/2, so its noise multiplier is 3
    apart = epsilon([SampledGaussian(1.0, 1.0, 4), SampledGaussian(3.0, 1.0, 4)], 1e-5)
    assert epsilon([SampledGaussian(noise_for_both(settings), 1.0, 4)], 1e-5) == pytest.approx(apart, rel=2e-3)


def test_the_count_is_in_the_promise_and_in_the_charge() -> None:
    plain = plan_client_level(level().model_copy(update={"adaptive_clip": None}), rounds=3, patients=50)
    adaptive = plan_client_level(level(count_noise=0.5), rounds=3, patients=50)
    assert plain.noise_multiplier == 0.5  # half of 1: a patient may turn the update around in the clip
    assert adaptive.noise_multiplier == pytest.approx(0.5 / math.sqrt(2))
    assert adaptive.epsilon > plain.epsilon
    with pytest.raises(ConfigError, match="with the count of adaptive_clip"):
        plan_client_level(level(count_noise=0.01), rounds=3, patients=50)


def test_count_noise_that_is_not_given_is_twice_that_of_the_update() -> None:
    assert count_noise(level(), AdaptiveClip()) == 2.0
    assert count_noise(level(), AdaptiveClip(count_noise=0.3)) == 0.3


@given(st.floats(0.002, 2000.0))
def test_a_clip_is_read_back_from_its_name(clip: float) -> None:
    assert clip_of([number_within(clip)], level()) == clip


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["loss"],
        ["within clip "],
        ["within clip nan"],
        ["within clip inf"],
        ["within clip 2"],  # another spelling of 2.0 would be another encoding of one clip
        ["within clip 0.0019"],
        ["within clip 2000.1"],
        ["within clip 2.0", "loss"],
        ["within clip 2.0", ""],
    ],
)
def test_anything_else_is_refused(names: list[str]) -> None:
    with pytest.raises(ProtocolError, match="names no clip"):
        clip_of(names, level())
