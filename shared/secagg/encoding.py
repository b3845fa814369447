"""Updates and scalars as integers modulo 2^b and 2^64, and sums of them back as numbers: both halves in one file.

A value u of a site with n patients becomes round(clip(u, -C, C) * n / N * S / C), where N is at least the sum of all
n, and S leaves room for rounding: no sum can overflow, and no bit is spent on head-room.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.shared.errors import ProtocolError, TrainingError
from medfl.shared.secagg.hashing import tagged_hash
from medfl.shared.secagg.prg import random_words
from medfl.shared.secagg.reasons import Reason
from medfl.shared.secagg.rings import Ring, RingVector
from medfl.shared.secagg.wire import Reader
from medfl.shared.weights import Flat

WEIGHT, CLIPPED = "weight", "clipped"
"""Names of the two scalars that every sum has: the weight n, and how many values were clipped."""

MAX_SCALAR = float(1 << 36)
"""Largest absolute value of a scalar: 128 of them stay inside 64 bits at a resolution of 2^-20."""

_SCALAR_UNIT = float(1 << 20)
_BLOCK = 1 << 15  # values at a time: the float64 block stays in the second-level cache
_MAX_SEGMENTS, _MAX_SCALARS, _MAX_NAME = 100_000, 10_000, 100


@dataclass(frozen=True, slots=True)
class Segment:
    """``length`` consecutive values with one ``clip``: the largest absolute value that is not cut."""

    length: int
    clip: float


@dataclass(frozen=True)
class Encoding:
    """How numbers become integers; equal at all parties of a sum, by its digest.

    ``reference`` is N: the sum of all sites' weights, known to all (0 where no vector travels). ``scalars`` are the
    names of further numbers, in their order. ``stochastic`` rounds up or down at random with the right mean.
    """

    ring: Ring
    segments: tuple[Segment, ...]
    reference: int
    scalars: tuple[str, ...] = ()
    stochastic: bool = False

    def __post_init__(self) -> None:
        """Raise ProtocolError for an encoding that could not work."""
        if not all(0 < s.clip < 1e30 and s.length >= 1 for s in self.segments):
            raise ProtocolError("an encoding has a segment without values or without a positive clip")
        if not 0 <= self.reference < 2**36 or (self.segments and self.reference == 0):
            raise ProtocolError("an encoding needs the sum of all weights as its reference")
        names = (WEIGHT, CLIPPED, *self.scalars)
        if len(set(names)) != len(names) or not all(n.isascii() and 1 <= len(n) <= _MAX_NAME for n in names):
            raise ProtocolError("an encoding names a scalar twice or by something that is not a short ASCII name")
        if len(self.segments) > _MAX_SEGMENTS or len(self.scalars) > _MAX_SCALARS:
            raise ProtocolError("an encoding has too many segments or scalars")

    @cached_property
    def length(self) -> int:
        """Values in the vector."""
        return sum(segment.length for segment in self.segments)

    @property
    def slots(self) -> int:
        """uint64 slots for the scalars."""
        return 2 + len(self.scalars)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of :meth:`to_bytes` with its own tag."""
        return tagged_hash(b"encoding", self.to_bytes())

    def to_bytes(self) -> bytes:
        """The encoding as bytes: what a coordinator sends with the request to train."""
        head = struct.pack("<BBQI", self.ring, self.stochastic, self.reference, len(self.segments))
        segments = b"".join(struct.pack("<Qd", segment.length, segment.clip) for segment in self.segments)
        names = b"".join(struct.pack("<B", len(name)) + name.encode() for name in self.scalars)
        return head + segments + struct.pack("<H", len(self.scalars)) + names

    @classmethod
    def parse(cls, data: bytes) -> Encoding:
        """Raises ProtocolError when malformed or impossible."""
        reader = Reader(data, "an encoding")
        try:
            ring = Ring(reader.number("B"))
            stochastic = (False, True)[reader.number("B")]
        except (ValueError, IndexError):
            raise reader.error("names an unknown ring or rounding") from None
        reference, count = reader.number("Q"), reader.number("I")
        if count > _MAX_SEGMENTS:
            raise reader.error("has too many segments")
        segments = tuple(Segment(reader.number("Q"), reader.real()) for _ in range(count))
        try:
            names = tuple(reader.take(reader.number("B")).decode("ascii") for _ in range(reader.number("H")))
        except UnicodeDecodeError:
            raise reader.error("names a scalar in letters that are not ASCII") from None
        reader.end()
        return cls(ring, segments, reference, names, stochastic)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One site's numbers as integers: ``vector`` in the ring, ``scalars`` uint64, and how many values were clipped."""

    vector: RingVector
    scalars: NDArray[np.uint64]
    clipped: int


def encode(
    vector: Flat, encoding: Encoding, *, weight: int, scalars: Mapping[str, float], rounding_key: bytes = b""
) -> Encoded:
    """Encode one site's update and numbers.

    Args:
        vector: float32, one axis, ``encoding.length`` values.
        encoding: how.
        weight: the site's n, 1 to ``encoding.reference`` where there is a vector.
        scalars: exactly the names of ``encoding.scalars``; |value| below :data:`MAX_SCALAR`.
        rounding_key: 32 secret bytes for stochastic rounding, used once.

    Raises:
        TrainingError: a value is not finite, or a scalar too large.
        ProtocolError: sizes, names or the weight do not fit the encoding.
    """
    if vector.dtype != np.float32 or vector.shape != (encoding.length,):
        raise ProtocolError(f"expected float32[{encoding.length}] to sum, got {vector.dtype}{list(vector.shape)}")
    if weight < 1 or (encoding.segments and weight > encoding.reference):
        raise ProtocolError(
            f"weight {weight} is not between 1 and the consortium's total of {encoding.reference}: a new sum of the "
            "patient numbers is needed",
            reason=Reason.OTHER_ENCODING,
        )
    if set(scalars) != set(encoding.scalars):
        raise ProtocolError("the site's numbers are not the ones that the encoding names", reason=Reason.OTHER_ENCODING)
    out = np.empty(encoding.length, encoding.ring.dtype)
    clipped = 0
    for start, end, clip in _blocks(encoding):
        factor = weight / encoding.reference * encoding.ring.scale / clip
        noise = _fractions(end - start, rounding_key, start) if encoding.stochastic else None
        clipped += _encode_block(vector[start:end], out[start:end], clip, factor, noise)
    numbers = {WEIGHT: float(weight), CLIPPED: float(clipped), **scalars}
    slots = [_to_fixed(name, numbers[name]) for name in (WEIGHT, CLIPPED, *encoding.scalars)]
    return Encoded(out, np.array(slots, np.uint64), clipped)


def decode_mean(total: RingVector, encoding: Encoding, *, weight: float, terms: int) -> Flat:
    """The weighted mean, float32, of ``terms`` encoded vectors: their sum is ``total``, their weights' sum ``weight``.

    Rings of 20 bits and more are decoded in the memory of ``total``, which is lost.

    Raises:
        ProtocolError: the sum lies outside what honest terms can reach.
    """
    in_place = total.itemsize == 4
    mean: Flat = total.view(np.float32) if in_place else np.empty(total.size, np.float32)
    share = weight / encoding.reference if encoding.reference else 0.0
    if encoding.segments and not 0 < share <= 1:
        raise ProtocolError("the sites' weights add up to more than the consortium's total", reason="out of range")
    bound = encoding.ring.scale * share + terms
    for start, end, clip in _blocks(encoding):
        values = encoding.ring.centred(total[start:end])
        if max(int(values.max()), -int(values.min())) > bound:
            raise ProtocolError("the sum lies outside what its terms can reach", reason="out of range")
        mean[start:end] = values * (clip / encoding.ring.scale / share)
    return mean


def decode_scalars(total: NDArray[np.uint64], encoding: Encoding) -> dict[str, float]:
    """Sums of the scalars by name, :data:`WEIGHT` and :data:`CLIPPED` among them."""
    values = total.view(np.int64) / _SCALAR_UNIT
    return dict(zip((WEIGHT, CLIPPED, *encoding.scalars), values.tolist(), strict=True))


def _blocks(encoding: Encoding) -> Iterator[tuple[int, int, float]]:
    start = 0
    for segment in encoding.segments:
        end = start + segment.length
        for begin in range(start, end, _BLOCK):
            yield begin, min(begin + _BLOCK, end), segment.clip
        start = end


def _encode_block(block: Flat, out: RingVector, clip: float, factor: float, noise: NDArray[np.float64] | None) -> int:
    low, high = float(block.min()), float(block.max())
    if not (isfinite(low) and isfinite(high)):  # a NaN anywhere makes both NaN
        raise TrainingError("the update holds values that are not finite: training diverged", reason="not finite")
    values = block.astype(np.float64)
    clipped = 0
    if max(-low, high) > clip:
        clipped = int(np.count_nonzero(np.abs(values) > clip))
        np.clip(values, -clip, clip, out=values)
    np.multiply(values, factor, out=values)
    if noise is None:
        np.rint(values, out=values)
    else:
        np.floor(np.add(values, noise, out=values), out=values)
    signed: NDArray[Any] = out.view(np.dtype(f"<i{out.itemsize}"))
    np.copyto(signed, values, casting="unsafe")
    return clipped


def _fractions(count: int, key: bytes, start: int) -> NDArray[np.float64]:
    """Uniform on [0, 1), from another key for each block, so that blocks can be made one at a time."""
    if len(key) != 32:
        raise ValueError("stochastic rounding needs a key of 32 bytes")
    block_key = tagged_hash(b"rounding", key, struct.pack("<Q", start))
    return random_words(count, block_key).astype(np.float64) * 2.0**-32


def _to_fixed(name: str, value: float) -> int:
    if not isfinite(value):
        raise TrainingError(f"{name} is not finite: training diverged", reason="not finite")
    if abs(value) >= MAX_SCALAR:
        raise TrainingError(f"{name} is too large to be summed: it must stay below {MAX_SCALAR:g}", reason="too large")
    return round(value * _SCALAR_UNIT) % (1 << 64)
