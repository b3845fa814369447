"""Each attack must succeed where nothing protects, and find no more than is promised where the private step does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from medfl.client.privacy import patient_gradient
from medfl.client.privacy.randomness import noisy
from medfl.shared.privacy.accounting import SampledGaussian, epsilon
from medfl.shared.privacy.plan import TrainingPlan
from medfl.shared.privacy.settings import DpSgd, Unit
from medfl.simulations import inversion, membership
from medfl.simulations.one_run import OneRun, audit_one_run, canary_step, epsilon_of, lower_bound, p_value


def one_run(noise: float) -> OneRun:
    return audit_one_run(
        canary_step(1000), canaries=1000, noise_multiplier=noise, sampling_rate=0.1, steps=50, delta=1e-5
    )


def test_one_run_refutes_a_small_epsilon_where_nothing_protects() -> None:
    found = one_run(1e-3)
    assert found.epsilon > 2.5
    assert found.right > 0.95 * found.guesses


def test_one_run_of_the_private_step_refutes_nothing_that_the_accountant_claims() -> None:
    found = one_run(1.0)
    assert found.passed
    assert found.epsilon <= epsilon([SampledGaussian(1.0, 0.1, 50)], 1e-5)
    # 50 steps move a canary by 50 * 0.1 = 5 in the mean; variance 50 * (1 + 0.1 * 0.9 / 2) = 52.25; 5 / 7.228 = 0.692
    assert found.expected_mu == pytest.approx(0.692, abs=5e-4)
    assert found.mu == pytest.approx(found.expected_mu, abs=found.margin)


def test_one_run_flags_half_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        patient_gradient, "noisy", lambda total, scale, *rest, **more: noisy(total, scale / 2, *rest, **more)
    )
    assert not one_run(1.0).passed


def test_the_lower_bound_is_the_one_worked_out_by_hand() -> None:
    # all of 200 right refutes every accuracy q with q^200 < 0.05: q = 0.98513, epsilon = ln(q / (1 - q)) = 4.19
    q = 0.05 ** (1 / 200)
    assert lower_bound(1000, guesses=200, right=200, delta=0.0) == pytest.approx(math.log(q / (1 - q)), abs=1e-4)
    assert lower_bound(1000, guesses=200, right=100, delta=0.0) == 0.0
    assert lower_bound(1000, guesses=200, right=190, delta=1e-3) < lower_bound(1000, guesses=200, right=190, delta=1e-6)
    assert p_value(1000, 200, 0, 1.0, 1e-5) == 1.0


def test_the_epsilon_of_a_mu_is_the_accountants() -> None:
    for noise in (0.5, 1.0, 4.0):
        claimed = epsilon([SampledGaussian(noise, 1.0, 1)], 1e-5)
        assert epsilon_of(1 / noise, 1e-5) == pytest.approx(claimed, rel=0.01)
    assert epsilon_of(0.0, 1e-5) == 0.0


def private_training(noise: float) -> membership.Train:
    settings = DpSgd(mode="dp-sgd", epsilon=1e4, expected_batch=10)
    return membership.protected(settings, TrainingPlan(Unit.PATIENT, 1e4, 1e-5, 1.0, noise, 0.1, 10.0, 30))


def test_membership_shows_in_a_model_trained_without_protection_and_hardly_in_a_private_one() -> None:
    bare = membership.attack_membership(membership.unprotected, models=8)
    private = membership.attack_membership(private_training(4.0), models=8)
    assert bare.area > 0.75
    assert bare.found > 0.05
    # mu = 0.1 * sqrt(30 * (exp(1 / 16) - 1)) = 0.139: the best attack has area Phi(0.139 / sqrt 2) = 0.539
    assert private.area < 0.539 + 0.08


def test_the_curve_of_a_perfect_and_of_a_blind_attack() -> None:
    ones, zeros = np.ones(100), np.zeros(100)
    assert membership._curve(ones, zeros) == (1.0, 1.0)
    assert membership._curve(zeros, zeros) == (0.5, 0.0)
    assert membership._curve(zeros, ones) == (0.0, 0.0)


def test_an_unprotected_step_gives_the_picture_away_and_clipping_alone_does_not_help() -> None:
    for release in (inversion.unprotected, inversion.protected(1e-6)):
        found = inversion.attack_gradients(release, restarts=1)
        assert found.division > 60
        assert found.search > inversion.RECOGNISABLE_DB


def test_noise_hides_the_picture() -> None:
    found = inversion.attack_gradients(inversion.protected(1.0), restarts=1)
    assert found.division < 20
    assert found.search < 20


def test_made_up_pictures_are_pictures() -> None:
    picture = inversion.made_up_picture(0)
    assert picture.shape == (1, 1, 16, 16)
    assert (float(picture.min()) >= 0, float(picture.max())) == (True, 1.0)
    assert inversion.psnr(picture, picture) == 120
    assert inversion.psnr(torch.zeros(4), torch.ones(4)) == pytest.approx(0.0)
