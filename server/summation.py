"""Weighted sum of updates as they arrive, in fixed point: one model in memory, and no order of arrival shows."""

from __future__ import annotations

from math import isfinite

import numpy as np
from numpy.typing import NDArray

from medfl.shared.errors import ProtocolError
from medfl.shared.weights import Flat

_FRACTION_BITS = 32
_SCALE = float(1 << _FRACTION_BITS)
_MAX_TERM = float(1 << 54)  # 512 terms below it stay below 2**63
_MAX_TERMS = 512
_BLOCK = 1 << 18  # values converted at a time, so that no second model is held


class FixedPointSum:
    """Adds ``weight * update`` in int64 with 32 fraction bits. Addition of integers is exact, so it commutes."""

    def __init__(self, length: int) -> None:
        self._sum: NDArray[np.int64] = np.zeros(length, np.int64)
        self.weight = 0
        self.terms = 0

    def add(self, update: Flat, weight: int) -> None:
        """Add one site's update.

        Raises:
            ProtocolError: wrong length, weight below 1, a value that is not finite or too large; nothing is added then.
        """
        if update.shape != self._sum.shape:
            raise ProtocolError(f"the update has {update.size} values, the study's network has {self._sum.size}")
        if weight < 1:
            raise ProtocolError("the update has a weight below 1")
        largest = max(float(update.max(initial=0.0)), -float(update.min(initial=0.0)))
        if not isfinite(largest):
            raise ProtocolError("the update holds values that are not finite")
        if largest * weight * _SCALE >= _MAX_TERM:
            raise ProtocolError("the update is too large to be summed: the site's training diverged")
        if self.terms == _MAX_TERMS:
            raise ProtocolError(f"{_MAX_TERMS} updates are in the sum, and it holds no more: set sites_per_round")
        for start in range(0, update.size, _BLOCK):
            block = update[start : start + _BLOCK].astype(np.float64)
            np.rint(np.multiply(block, weight * _SCALE, out=block), out=block)
            self._sum[start : start + _BLOCK] += block.astype(np.int64)
        self.weight += weight
        self.terms += 1

    def mean(self) -> Flat:
        """The weighted mean of what was added, float32."""
        if self.weight == 0:
            raise ProtocolError("no update was added")
        mean = np.empty(self._sum.size, np.float32)
        for start in range(0, mean.size, _BLOCK):
            mean[start : start + _BLOCK] = self._sum[start : start + _BLOCK] / (self.weight * _SCALE)
        return mean
