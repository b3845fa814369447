"""Bulyan: Krum's choice one by one, then a trimmed mean (El Mhamdi et al. 2018, https://arxiv.org/abs/1802.07927).

Flower's own takes Multi-Krum's choice at once, and collects garbage in the whole process for every update.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medfl.shared.errors import ProtocolError
from medfl.shared.weights import Flat
from medfl.strategies.rule import Memory, Rule, Turn

_BLOCK = 1 << 18  # coordinates at a time, so that no second copy of all updates is held


def bulyan(*, malicious: int) -> Rule:
    """Withstands ``malicious`` sites among at least ``4 * malicious + 3``."""

    def rule(turn: Turn, memory: Memory) -> tuple[Flat, Memory]:
        steps = [update.step for update in turn.updates]
        if len(steps) < 4 * malicious + 3:
            raise ProtocolError(f"bulyan needs {4 * malicious + 3} updates against {malicious}, got {len(steps)}")
        chosen = [steps[index] for index in krum_order(steps, malicious)[: len(steps) - 2 * malicious]]
        return np.asarray(turn.sent + nearest_mean(chosen, len(chosen) - 2 * malicious), np.float32), memory

    return rule


def krum_order(points: Sequence[Flat], malicious: int) -> list[int]:
    """Indices of ``points`` as Krum would take them, each time among those that are left."""
    squared = np.zeros((len(points), len(points)))
    for row, point in enumerate(points):
        for column in range(row):
            difference = (point - points[column]).astype(np.float64)
            squared[row, column] = squared[column, row] = float(difference @ difference)
    left, order = list(range(len(points))), []
    while left:
        neighbours = max(1, len(left) - malicious - 2)
        # The first of the sorted distances is the point's own, 0.
        scores = [np.sort(squared[i, left])[1 : neighbours + 1].sum() for i in left]
        order.append(left.pop(int(np.argmin(scores))))
    return order


def nearest_mean(points: Sequence[Flat], keep: int) -> NDArray[np.float32]:
    """By coordinate, the mean of the ``keep`` values nearest to the median."""
    mean = np.empty(points[0].size, np.float32)
    for start in range(0, mean.size, _BLOCK):
        block = np.stack([point[start : start + _BLOCK] for point in points])
        away = np.abs(block - np.median(block, axis=0))
        nearest = np.argpartition(away, keep - 1, axis=0)[:keep]
        mean[start : start + _BLOCK] = np.take_along_axis(block, nearest, axis=0).mean(0)
    return mean
