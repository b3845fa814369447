from __future__ import annotations

import numpy as np
import pytest

from medfl.client.privacy.randomness import SecureGenerator
from medfl.client.privacy.site_noise import clipped_and_noised, noised_half
from medfl.shared.weights import Flat


def share(update: Flat, *, clip: float = 2.0, noise: float = 3.0, survivors: int = 9) -> Flat:
    return clipped_and_noised(
        update, clip_norm=clip, noise_multiplier=noise, survivors=survivors, generator=SecureGenerator()
    )


def test_a_share_has_the_promised_standard_deviation() -> None:
    # 3 * 2 / sqrt(9) = 2; the standard error of a standard deviation from 40,000 draws is 2 / sqrt(80,000) = 0.007
    assert share(np.zeros(40_000, np.float32)).std() == pytest.approx(2.0, abs=0.035)


def test_the_fewest_survivors_add_up_to_the_noise_of_the_whole_sum_and_more_have_more() -> None:
    # nine shares of 2: 2 * 3 = 6 = noise multiplier * clip norm; sixteen: 8
    for sites, expected in ((9, 6.0), (16, 8.0)):
        total = np.sum([share(np.zeros(40_000, np.float32)) for _ in range(sites)], axis=0)
        assert total.std() == pytest.approx(expected, rel=0.02)


def test_the_whole_update_is_clipped_once_over_all_its_values() -> None:
    update = np.array([6.0, 8.0], np.float32)  # norm 10, clipped to 2
    assert share(update, noise=1e-6) == pytest.approx([1.2, 1.6], abs=1e-4)
    assert np.linalg.norm(share(update, noise=1e-9)) <= 2.0 + 1e-6
    assert share(update / 10, noise=1e-6) == pytest.approx([0.6, 0.8], abs=1e-4)  # norm 1: left as it is


def test_what_is_released_is_float32_and_the_update_is_left_alone() -> None:
    update = np.ones(5, np.float32)
    released = share(update)
    assert released.dtype == np.float32
    assert (update == 1).all()


def half(update: list[float], *, clip: float = 5.0, noise: float = 1e-6, survivors: int = 9) -> float:
    return noised_half(
        np.array(update, np.float32),
        clip_norm=clip,
        count_noise=noise,
        survivors=survivors,
        generator=SecureGenerator(),
    )


def test_a_site_says_whether_its_update_was_within_the_clip_as_plus_or_minus_one_half() -> None:
    assert half([3.0, 4.0]) == pytest.approx(0.5, abs=1e-4)  # norm 5, the clip itself
    assert half([3.0, 4.1]) == pytest.approx(-0.5, abs=1e-4)


def test_the_halves_of_the_fewest_survivors_have_the_counts_noise_together() -> None:
    # nine sites of which each adds 3 / sqrt(9) = 1: 3 in all; standard error of 2,000 draws 1.6 %
    sums = [sum(half([1.0], noise=3.0) for _ in range(9)) for _ in range(2_000)]
    assert np.std(sums) == pytest.approx(3.0, rel=0.06)
    assert np.mean(sums) == pytest.approx(4.5, abs=0.25)
