"""Rings of 16, 20, 24 and 32 bits: the type in memory, the form on the wire, and sums taken straight from the wire."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.shared.errors import ProtocolError

RingVector = NDArray[Any]
"""uint32 or uint16 (or signed of that size), one axis: values modulo 2^bits (20, 24 bits: the low bits of uint32)."""

_BLOCK = 1 << 16  # values at a time; even, so that 20-bit pairs never straddle two blocks


class Ring(IntEnum):
    """Number of bits of one value. 32: fp32 accuracy. 16: half the bytes. 20 and 24: packed, between the two."""

    BITS_16 = 16
    BITS_20 = 20
    BITS_24 = 24
    BITS_32 = 32

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a vector in memory."""
        return np.dtype("<u2") if self is Ring.BITS_16 else np.dtype("<u4")

    @property
    def packed(self) -> bool:
        """Whether the wire holds bytes (uint8) instead of the vector itself."""
        return self in (Ring.BITS_20, Ring.BITS_24)

    @property
    def scale(self) -> int:
        """Largest value one site's share of the sum may have; 128 units are left for the rounding of 128 sites.

        >>> Ring.BITS_16.scale
        32639
        """
        return (1 << (self - 1)) - 1 - 128

    def wire_size(self, length: int) -> int:
        """Number of array elements on the wire for ``length`` values."""
        match self:
            case Ring.BITS_20:
                return -(-length // 2) * 5
            case Ring.BITS_24:
                return length * 3
            case _:
                return length

    def pack(self, vector: RingVector) -> NDArray[Any]:
        """The wire form of ``vector``: itself for 16 and 32 bits, else little-endian bytes (20 bits: 5 for a pair)."""
        if not self.packed:
            return vector
        wire = np.empty(self.wire_size(vector.size), np.uint8)
        for start in range(0, vector.size, _BLOCK):
            block = vector[start : start + _BLOCK]
            begin = self.wire_size(start)
            packed = _pack24(block) if self is Ring.BITS_24 else _pack20(block)
            wire[begin : begin + packed.size] = packed
        return wire

    def check_wire(self, wire: NDArray[Any], length: int) -> None:
        """Raise ProtocolError unless ``wire`` has the type and size of ``length`` values on the wire."""
        dtype = np.dtype(np.uint8) if self.packed else self.dtype
        if wire.dtype != dtype or wire.shape != (self.wire_size(length),) or not wire.flags.c_contiguous:
            raise ProtocolError(
                f"a masked vector must be {dtype}[{self.wire_size(length)}], got {wire.dtype}{list(wire.shape)}"
            )

    def add_wire(self, total: RingVector, wire: NDArray[Any]) -> None:
        """Add a vector in wire form to ``total``, in place, modulo 2^bits (bits above 20 or 24 are left undefined)."""
        if not self.packed:
            np.add(total, wire, out=total)
            return
        for start in range(0, total.size, _BLOCK):
            block = total[start : start + _BLOCK]
            packed = wire[self.wire_size(start) : self.wire_size(start + block.size)]
            values = _unpack24(packed) if self is Ring.BITS_24 else _unpack20(packed)
            np.add(block, values[: block.size], out=block)

    def centred(self, block: RingVector) -> RingVector:
        """``block`` as signed integers in [-2^(bits-1), 2^(bits-1)); a view of it for 16 and 32 bits."""
        signed: RingVector = block.view(np.dtype(f"<i{block.itemsize}"))
        if not self.packed:
            return signed
        half = 1 << (self - 1)
        return ((signed + half) & ((1 << self) - 1)) - half


def _pack24(block: RingVector) -> NDArray[np.uint8]:
    return np.ascontiguousarray(block.view(np.uint8).reshape(-1, 4)[:, :3]).reshape(-1)


def _unpack24(wire: NDArray[np.uint8]) -> NDArray[np.uint32]:
    wide = np.zeros((wire.size // 3, 4), np.uint8)
    wide[:, :3] = wire.reshape(-1, 3)
    return wide.view("<u4").reshape(-1)


def _pack20(block: RingVector) -> NDArray[np.uint8]:
    even = np.zeros(-(-block.size // 2) * 2, np.uint64)
    even[: block.size] = block & np.uint32(0xFFFFF)
    pairs = even[0::2] | (even[1::2] << np.uint64(20))
    return np.ascontiguousarray(pairs.view(np.uint8).reshape(-1, 8)[:, :5]).reshape(-1)


def _unpack20(wire: NDArray[np.uint8]) -> NDArray[np.uint32]:
    wide = np.zeros((wire.size // 5, 8), np.uint8)
    wide[:, :5] = wire.reshape(-1, 5)
    pairs = wide.view("<u8").reshape(-1)
    values = np.empty(pairs.size * 2, np.uint32)
    values[0::2] = pairs & np.uint64(0xFFFFF)
    values[1::2] = pairs >> np.uint64(20)
    return values
