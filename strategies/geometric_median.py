"""Geometric median of updates, RFA (Pillutla et al. 2022, https://arxiv.org/abs/1912.13445, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medfl.shared.weights import Flat
from medfl.strategies.rule import Memory, Rule, Turn

_NEAREST = 1e-6
"""Distances below it count as this one: the smoothing that keeps the iteration from dividing by zero."""


def geometric_median(*, iterations: int) -> Rule:
    """The point with the least sum of distances to the updates, weighted by examples."""

    def rule(turn: Turn, memory: Memory) -> tuple[Flat, Memory]:
        centre = smoothed_weiszfeld(
            [update.step for update in turn.updates], [update.examples for update in turn.updates], iterations
        )
        return np.asarray(turn.sent + centre, np.float32), memory

    return rule


def smoothed_weiszfeld(points: Sequence[Flat], weights: Sequence[float], iterations: int) -> NDArray[np.float64]:
    """Weighted geometric median of ``points`` (one flat vector each), from their mean on. float64.

    One pass over the points for each iteration; besides the points themselves two vectors are held.
    """
    share = np.asarray(weights, np.float64) / np.sum(weights)
    centre = _mean(points, share)
    for _ in range(iterations):
        distances = np.array([float(np.linalg.norm(centre - point)) for point in points])
        pull = share / np.maximum(distances, _NEAREST)
        centre = _mean(points, pull / pull.sum())
    return centre


def _mean(points: Sequence[Flat], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    mean = np.zeros(points[0].size)
    for point, share in zip(points, shares, strict=True):
        mean += share * point
    return mean
