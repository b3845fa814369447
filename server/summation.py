"""Weighted sum of updates as they arrive, in fixed point: one model in memory, and no order of arrival shows."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.shared.errors import ProtocolError
from medfl.shared.weights import Flat

_FRACTION_BITS = 32
_SCALE = float(1 << _FRACTION_BITS)
_FRACTION = (1 << _FRACTION_BITS) - 1
_NARROW = float(1 << 15)  # whole numbers below it fit into 16 bits
_MAX_TERM = float(1 << 54)  # 512 terms below it stay below 2**63
_MAX_TERMS = 512
_BLOCK = 1 << 18  # values converted at a time, so that no second model is held


class FixedPointSum:
    """Adds ``weight * update`` in fixed point with 32 fraction bits. Addition of integers is exact, so it commutes.

    Fractions and whole numbers of the sum are held apart, whole numbers in 16 bits while all surely fit, then in 32:
    one and a half models of float32, or two.
    """

    def __init__(self, length: int) -> None:
        self._fractions: NDArray[np.uint32] = np.zeros(length, np.uint32)
        self._room: NDArray[np.int32] = np.zeros(length, np.int32)  # pages that nobody has written to take no memory
        self._whole: NDArray[np.signedinteger[Any]] = self._room.view(np.int16)[:length]
        self._largest = 0.0  # no entry of the sum is further from zero
        self.weight = 0
        self.terms = 0

    def add(self, update: Flat, weight: int) -> None:
        """Add one site's update.

        Raises:
            ProtocolError: wrong length, weight below 1, a value that is not finite or too large; nothing is added then.
        """
        if update.shape != self._fractions.shape:
            raise ProtocolError(f"the update has {update.size} values, the study's network has {self._fractions.size}")
        if weight < 1:
            raise ProtocolError("the update has a weight below 1")
        largest = max(float(np.maximum.reduce(update, initial=0.0)), -float(np.minimum.reduce(update, initial=0.0)))
        if not isfinite(largest):
            raise ProtocolError("the update holds values that are not finite")
        if largest * weight * _SCALE >= _MAX_TERM:
            raise ProtocolError("the update is too large to be summed: the site's training diverged")
        if self.terms == _MAX_TERMS:
            raise ProtocolError(f"{_MAX_TERMS} updates are in the sum, and it holds no more: set sites_per_round")
        self._largest += largest * weight + 1  # one for what rounding adds
        if self._largest >= _NARROW and self._whole.dtype == np.int16:
            self._widen()
        for start in range(0, update.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            block = np.multiply(update[part], weight * _SCALE, dtype=np.float64)
            np.rint(block, out=block)
            total = block.astype(np.int64)
            total += self._fractions[part]
            self._fractions[part] = total & _FRACTION
            self._whole[part] += total >> _FRACTION_BITS
        self.weight += weight
        self.terms += 1

    def mean(self) -> Flat:
        """The weighted mean of what was added, float32."""
        if self.weight == 0:
            raise ProtocolError("no update was added")
        mean = np.empty(self._fractions.size, np.float32)
        for start in range(0, mean.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            total = self._whole[part] * _SCALE  # exact in float64; the sum is rounded once
            mean[part] = np.divide(np.add(total, self._fractions[part], out=total), self.weight * _SCALE, out=total)
        return mean

    @property
    def bytes_held(self) -> int:
        """Memory that the sum takes."""
        return self._fractions.nbytes + self._whole.nbytes

    def _widen(self) -> None:
        """Give whole numbers 32 bits, in place: from the end, so that none is overwritten before it is moved."""
        for end in range(self._whole.size, 0, -_BLOCK):
            part = slice(max(0, end - _BLOCK), end)
            self._room[part] = self._whole[part].copy()
        self._whole = self._room
