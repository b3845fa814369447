"""Auditing epsilon in one training run (Steinke, Nasr, Jagielski 2023, https://arxiv.org/abs/2305.08846).

Half of many canaries, chosen at random, take part in training. Each has a direction of the gradient to itself, so all
are guessed from one run: who guesses better than (epsilon, delta) allows has refuted that epsilon.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medfl.client.privacy.clipped import UnitData
from medfl.client.privacy.patient_gradient import sample_patients
from medfl.client.privacy.randomness import SecureGenerator
from medfl.shared.privacy.settings import Engine
from medfl.simulations.audit import STANDARD_ERRORS, Step, real_step

CONFIDENCE = 0.95
_GUESSED = 0.1  # of the canaries, the highest are guessed in and as many of the lowest out; the others are left open
_STRENGTH = 100.0  # norm of a canary's gradient before the clip, so that clipping is what bounds it


@dataclass(frozen=True, slots=True)
class OneRun:
    """What one run told. ``epsilon`` is a lower bound at 95 % confidence, ``mu`` an estimate with its expectation."""

    guesses: int
    right: int
    epsilon: float
    mu: float  # distance of the scores of canaries in and out, in standard deviations
    expected_mu: float
    margin: float  # five standard errors of mu

    @property
    def passed(self) -> bool:
        """Whether canaries stand out no more than the promised noise allows."""
        return self.mu <= self.expected_mu + self.margin


def canary_step(canaries: int, *, engine: Engine = Engine.BOOKKEEPING) -> Step:
    """The product's own step on a network in which every canary has a weight to itself."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(canaries, 1, bias=False))
    return real_step(network, lambda outputs, labels: outputs.mean(), clip_norm=0.5, engine=engine)


def audit_one_run(
    step: Step, *, canaries: int, noise_multiplier: float, sampling_rate: float, steps: int, delta: float
) -> OneRun:
    """Train once with half of ``canaries``, through the product's sampling and ``step``, and guess which half."""
    generator = SecureGenerator()
    inside = generator.bernoulli(canaries, 0.5)
    members = [_canary(int(index), canaries) for index in np.flatnonzero(inside)]
    scores = torch.zeros(canaries, dtype=torch.float64)
    for _ in range(steps):
        scores += step([members[i] for i in sample_patients(len(members), sampling_rate, generator)], noise_multiplier)
    guesses = int(_GUESSED * canaries)
    order = torch.argsort(scores).numpy()
    right = int(inside[order[-guesses:]].sum() + (~inside[order[:guesses]]).sum())
    mu = _distance(scores, inside)
    variance = steps * (noise_multiplier**2 + sampling_rate * (1 - sampling_rate) / 2)
    return OneRun(
        guesses=2 * guesses,
        right=right,
        epsilon=lower_bound(canaries, guesses=2 * guesses, right=right, delta=delta),
        mu=mu,
        expected_mu=steps * sampling_rate / math.sqrt(variance),
        margin=STANDARD_ERRORS * math.sqrt((4 + mu**2 / 2) / canaries),
    )


def lower_bound(canaries: int, *, guesses: int, right: int, delta: float) -> float:
    """Largest epsilon that ``right`` of ``guesses`` refute at 95 % confidence; 0 when they refute none.

    >>> lower_bound(1000, guesses=200, right=100, delta=1e-5)
    0.0
    """
    low, high = 0.0, 1.0
    while high < 100 and p_value(canaries, guesses, right, high, delta) < 1 - CONFIDENCE:
        low, high = high, high + 1
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if p_value(canaries, guesses, right, middle, delta) < 1 - CONFIDENCE else (low, middle)
        )
    return 0.0 if low < 1e-6 else low


def epsilon_of(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism with ``mu`` (Balle & Wang 2018, https://arxiv.org/abs/1805.06530, Theorem 8).

    >>> round(epsilon_of(1.0, 1e-5), 2)
    4.38
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    def above(epsilon: float) -> float:
        shift = epsilon / mu
        return float(norm.cdf(mu / 2 - shift) - math.exp(epsilon + norm.logcdf(-mu / 2 - shift)) - delta)

    return 0.0 if mu <= 0 or above(0.0) <= 0 else float(brentq(above, 0.0, mu**2 / 2 + 20 * mu + 1))


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Chance of at least ``right`` right guesses under (``epsilon``, ``delta``): Theorem 5.2 and appendix D."""
    from scipy.stats import binom

    accuracy = 1 / (1 + math.exp(-epsilon))
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, accuracy))
    alpha = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, float(binom.sf(right - 1, guesses, accuracy)) + 2 * canaries * delta * alpha)


def _canary(index: int, canaries: int) -> UnitData:
    image = torch.zeros(1, canaries)
    image[0, index] = _STRENGTH
    return image, torch.zeros(1)


def _distance(scores: Tensor, inside: NDArray[np.bool_]) -> float:
    chosen = torch.from_numpy(inside)
    there, not_there = scores[chosen], scores[~chosen]
    spread = torch.sqrt((there.var() + not_there.var()) / 2).clamp(min=1e-12)
    return float((there.mean() - not_there.mean()) / spread)
