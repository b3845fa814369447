"""Noise has the promised distribution, and wrong scales are rejected; sampling rates hold; no seed reaches either."""

import random

import numpy as np
import pytest
import torch
from monai.utils.misc import set_determinism
from scipy import stats

from medfl.client.privacy import randomness
from medfl.client.privacy.randomness import SUMMED, Function, SecureGenerator, noisy

# p values below this reject: a right generator fails once in ten million runs.
REJECT = 1e-7


def accepts(draws: np.ndarray, scale: float) -> bool:
    """Kolmogorov-Smirnov and variance tests against a normal of standard deviation ``scale``."""
    statistic = float(np.square(draws / scale).sum())
    variance = 2 * min(stats.chi2.cdf(statistic, len(draws)), stats.chi2.sf(statistic, len(draws)))
    return bool(stats.kstest(draws / scale, "norm").pvalue > REJECT and variance > REJECT)


@pytest.mark.parametrize("functions", [randomness._BY_NUMPY, randomness._BY_TORCH], ids=["numpy", "torch"])
@pytest.mark.parametrize(("scale", "accepted"), [(1.0, True), (2 / 3, False), (3 / 2, False), (0.97, False)])
def test_normals_are_accepted_at_their_scale_only(
    scale: float, accepted: bool, functions: tuple[Function, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(randomness, "_functions", lambda: functions)
    draws = SecureGenerator().normal(100_000).numpy()
    assert accepts(draws, scale) is accepted


@pytest.mark.parametrize(("factor", "accepted"), [(1.0, True), (2 / 3, False), (3 / 2, False)])
def test_released_noise_is_accepted_at_noise_multiplier_times_clip_only(factor: float, accepted: bool) -> None:
    # noise multiplier 1.5, clip norm 0.2
    released = noisy(torch.full((300, 100), 7.0), 1.5 * 0.2, SecureGenerator())
    assert accepts((released - 7.0).flatten().numpy(), 0.3 * factor) is accepted


def test_normals_are_independent_within_and_between_chunks() -> None:
    draws = SecureGenerator().normal(400_000).numpy()
    chunk = randomness._CHUNK
    for lag in (1, 2, chunk - 1, chunk, chunk + 1, 2 * chunk, 3 * chunk, 4 * chunk):  # the same four mixed, the next
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 5.5 / np.sqrt(len(draws))
        assert abs(np.corrcoef(draws[:-lag] ** 2, draws[lag:] ** 2)[0, 1]) < 5.5 / np.sqrt(len(draws))


@pytest.mark.parametrize("count", [0, 1, 7, 65_535, 65_536, 65_537, 200_000])
def test_any_number_of_normals_can_be_had(count: int) -> None:
    generator = SecureGenerator()
    parts = torch.cat([generator.normal(count), generator.normal(3)])
    assert len(parts) == count + 3
    assert parts.unique().numel() == count + 3
    assert parts.isfinite().all()


def test_given_out_noise_is_wiped_from_the_generator() -> None:
    generator = SecureGenerator()
    drawn = generator.normal(100)
    assert not torch.isin(generator._ready, drawn).any()


def test_each_sample_sums_several_gaussians() -> None:
    assert SUMMED >= 4


def test_uniforms_are_uniform_and_open() -> None:
    draws = SecureGenerator().uniform(100_000)
    assert stats.kstest(draws, "uniform").pvalue > REJECT
    assert 0 < draws.min() < draws.max() < 1


@pytest.mark.parametrize("rate", [0.0, 0.01, 1 / 3, 0.9, 1.0])
def test_units_are_drawn_at_the_sampling_rate(rate: float) -> None:
    drawn = int(SecureGenerator().bernoulli(200_000, rate).sum())
    if rate in (0.0, 1.0):
        assert drawn == 200_000 * rate
    else:
        assert stats.binomtest(drawn, 200_000, rate).pvalue > REJECT
        assert stats.binomtest(drawn, 200_000, rate * 1.5 % 1).pvalue < REJECT


def test_draws_of_one_step_are_independent() -> None:
    flags = SecureGenerator().bernoulli(200_000, 0.3).reshape(2, -1)
    both = int((flags[0] & flags[1]).sum())
    assert stats.binomtest(both, 100_000, 0.09).pvalue > REJECT


def test_chosen_slices_are_different_and_evenly_spread() -> None:
    generator = SecureGenerator()
    chosen = np.stack([generator.choose(5, 2) for _ in range(20_000)])
    assert (chosen[:, 0] != chosen[:, 1]).all()
    assert stats.chisquare(np.bincount(chosen.ravel(), minlength=5)).pvalue > REJECT
    assert sorted(generator.choose(3, 10)) == [0, 1, 2]


def test_no_seed_reaches_noise_or_sampling() -> None:
    draws = []
    for _ in range(2):
        with torch.random.fork_rng():
            set_determinism(7)
            torch.manual_seed(7)
            np.random.seed(7)
            random.seed(7)
            generator = SecureGenerator()
            draws.append((generator.normal(100), generator.bernoulli(100, 0.5), generator.words(4)))
    assert not torch.isin(draws[0][0], draws[1][0]).any()
    assert (draws[0][1] != draws[1][1]).any()
    assert not set(draws[0][2].tolist()) & set(draws[1][2].tolist())


def test_secure_noise_does_not_disturb_the_public_generator() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        SecureGenerator().normal(1000)
        assert torch.equal(torch.rand(3), expected)


class NoNoise:
    def normal(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 700.0])
def test_releases_lie_on_a_coarse_grid(scale: float) -> None:
    released = noisy(torch.randn(1000, dtype=torch.float64), scale, SecureGenerator()).numpy()
    grid = 2.0 ** (np.floor(np.log2(scale)) - 12)
    assert (released / grid == np.round(released / grid)).all()
    assert len(np.unique(released)) > 900


def test_any_shape_and_size_is_divided_and_keeps_its_type() -> None:
    for shape in ((), (3,), (5, 7), (40_000,)):
        released = noisy(torch.full(shape, 6.0), 1.0, NoNoise(), divisor=4.0)  # type: ignore[arg-type]
        assert released.shape == shape
        assert released.dtype == torch.float32
        assert released.eq(1.5).all()


def test_in_place_nothing_is_left_of_the_sum_without_noise() -> None:
    total = torch.full((40_000,), 6.0)
    released = noisy(total, 1.0, NoNoise(), divisor=4.0, in_place=True)  # type: ignore[arg-type]
    assert released.data_ptr() == total.data_ptr()
    assert total.eq(1.5).all()


def test_two_sums_closer_than_the_grid_cannot_be_told_apart() -> None:
    # The grid for scale 1 is 2^-12, about 2.4e-4.
    a = noisy(torch.tensor([0.25], dtype=torch.float64), 1.0, NoNoise())  # type: ignore[arg-type]
    b = noisy(torch.tensor([0.25 + 1e-9], dtype=torch.float64), 1.0, NoNoise())  # type: ignore[arg-type]
    assert torch.equal(a, b)


def angles_show(noise: torch.Tensor, *, blur: float) -> float:
    """How far the angles of the pairs behind ``noise`` lie on the lattice of float32, in standard deviations.

    Undoes the mixture of each block of four times 16,384 samples; ``blur`` is the standard deviation of what was
    rounded away. Beyond 2 and up to pi, float32 numbers are 2^-22 apart.
    """
    samples = noise.numpy().reshape(SUMMED, -1)
    sums, shifted = (samples[:2] + samples[2:]) / 2, (samples[:2] - samples[2:]) / 2
    cosines = np.stack([sums[0] + sums[1], sums[0] - sums[1]])
    sines = np.roll(np.stack([shifted[0] + shifted[1], shifted[0] - shifted[1]]), -1, axis=1)
    lengths, angles = np.hypot(cosines, sines), np.abs(np.arctan2(sines, cosines))
    seen = (angles > 2) & (lengths > 1)
    weights = np.exp(-2 * np.pi**2 * (blur * 2.0**22 / lengths[seen]) ** 2)
    waves = np.cos(2 * np.pi * angles[seen] * 2.0**22)
    return float((weights * waves).sum() / np.sqrt((weights**2).sum() / 2))


@pytest.mark.parametrize("scale", [1.0, 1.99])
def test_who_undoes_the_mixture_of_a_release_finds_no_lattice_of_angles(scale: float) -> None:
    generator, count = SecureGenerator(), SUMMED * 16384
    assert angles_show(generator.normal(count), blur=1e-9) > 50  # before the grid they are plain to see
    fine = 2.0 ** (np.floor(np.log2(scale)) - 20)
    rounded = (generator.normal(count) * scale / fine).round() * fine / scale
    assert scale == 1.0 or angles_show(rounded, blur=float(fine / scale) * 12**-0.5) > 8  # 2^-20 would not do

    released = [noisy(torch.zeros(count, dtype=torch.float64), scale, generator) / scale for _ in range(20)]
    found = [angles_show(one, blur=1e-7) for one in released]  # as if less were rounded away than is
    assert abs(np.mean(found)) < 4 / np.sqrt(20)
