"""Noise and sampling nobody can predict: AES-256 in counter mode, keyed by the operating system, hardened Gaussians.

A seed in a study, a call of ``torch.manual_seed`` or MONAI's ``set_determinism`` does not reach this generator.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

# Gaussians added up for one sample: one alone can be inverted from its low bits. The four go, with other signs, into
# three more samples (an orthogonal mixture, so the samples stay independent). Source: Holohan & Braghin 2021,
# https://arxiv.org/abs/2107.10138, section 5. Who knows all four samples can undo the mixture: what the low bits of
# lengths and angles are, :func:`noisy` hides.
SUMMED = 4

# Releases are multiples of about scale / 2^12, a thousand times the distance of two angles: with 2^20 the angles of
# 65,536 samples together could be seen, and so whether the sum before the noise was the one that was guessed.
GRID_BITS = 12

_CHUNK = 16384  # samples made at once are SUMMED times this: fewer calls, and the working set stays in the caches


Function = Callable[[torch.Tensor, torch.Tensor], None]
"""``function(values, out)``."""


class NoiseSource(Protocol):
    """Independent draws that no other party can predict or repeat."""

    def normal(self, count: int) -> torch.Tensor:
        """``count`` standard normal draws, float64, on the CPU."""
        ...

    def bernoulli(self, count: int, probability: float) -> NDArray[np.bool_]:
        """``count`` independent flags, each true with ``probability``."""
        ...


class SecureGenerator:
    """The :class:`NoiseSource` for everything private. Each instance draws its own 256-bit key from the OS."""

    def __init__(self) -> None:
        # A counter-mode cipher's encryption of zeros is its keystream.
        self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
        self._zeros = bytes(2 * _CHUNK * (8 + 4))  # a long word for each length, a short one for each angle
        self._block = bytearray(len(self._zeros) + 15)  # update_into wants one cipher block of slack
        self._lengths = torch.empty(2, _CHUNK, dtype=torch.float64)
        self._angles, self._cosines = torch.empty(2, _CHUNK), torch.empty(2, _CHUNK)
        self._pairs = torch.empty(2, 2, _CHUNK, dtype=torch.float64)
        self._sums = torch.empty(2, _CHUNK, dtype=torch.float64)
        self._ready = torch.empty(SUMMED, _CHUNK, dtype=torch.float64)
        self._given = self._ready.numel()  # how many of the ready normals were given out

    def words(self, count: int) -> NDArray[np.uint64]:
        """``count`` uniform 64-bit words."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Uniform draws on the open interval (0, 1), 53 bits each."""
        return ((self.words(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def bernoulli(self, count: int, probability: float) -> NDArray[np.bool_]:
        """``count`` independent flags, true with ``probability`` rounded down to a multiple of 2^-53."""
        return (self.words(count) >> np.uint64(11)) < np.uint64(int(probability * 2.0**53))

    def choose(self, population: int, count: int) -> NDArray[np.int64]:
        """``count`` different indices below ``population``, in random order; all of them when there are fewer."""
        return np.argsort(self.words(population), kind="stable")[:count].astype(np.int64)

    def normal(self, count: int) -> torch.Tensor:
        """``count`` standard normal draws, float64: each a scaled sum of Box-Muller normals from separate uniforms."""
        out = torch.empty(count, dtype=torch.float64)
        ready, done = self._ready.view(-1), 0
        while count - done >= len(ready):
            self._fill(out[done : done + len(ready)].view_as(self._ready))
            done += len(ready)
        while done < count:
            if self._given == len(ready):
                self._fill(self._ready)
                self._given = 0
            part = ready[self._given : self._given + count - done]
            out[done : done + len(part)] = part
            part.zero_()  # noise of a release must not be found in memory later
            self._given += len(part)
            done += len(part)
        return out

    def _fill(self, out: torch.Tensor) -> None:
        """Fresh normals for ``out`` (SUMMED, _CHUNK): Box-Muller makes two from each length and angle; four are mixed.

        Lengths have 52 random bits and double precision, and so do the samples. Angles have 24 bits: they place a
        sample to about 2^-22, which the grid of :func:`noisy` covers.
        """
        self._stream.update_into(self._zeros, self._block)
        words = np.frombuffer(self._block, dtype=np.uint64, count=2 * _CHUNK).reshape(2, _CHUNK)
        turns = torch.frombuffer(self._block, dtype=torch.int32, offset=16 * _CHUNK, count=2 * _CHUNK)
        lengths = self._lengths.numpy()
        # 52 random bits as the fraction of a double between 1 and 2.
        np.right_shift(words, 12, out=lengths.view(np.uint64))
        np.bitwise_or(lengths.view(np.uint64), 0x3FF0000000000000, out=lengths.view(np.uint64))
        np.subtract(2.0, lengths, out=lengths)  # above 0, at most 1
        # A sum of SUMMED standard normals has variance SUMMED.
        log, cos, sin = _functions()
        log(self._lengths, self._lengths)
        self._lengths.mul_(-2.0 / SUMMED)
        np.sqrt(lengths, out=lengths)
        angles = self._angles.copy_(turns.view(2, _CHUNK)).mul_(math.pi * 2.0**-31)
        cos(angles, self._cosines)
        torch.mul(self._cosines, self._lengths, out=self._pairs[0])
        # Shifted by one, so that no sample mixes cosine and sine of one pair.
        sin(angles, angles)
        torch.mul(angles[:, :-1], self._lengths[:, :-1], out=self._pairs[1, :, 1:])
        torch.mul(angles[:, -1:], self._lengths[:, -1:], out=self._pairs[1, :, :1])
        sums = torch.add(self._pairs[:, 0], self._pairs[:, 1], out=self._sums)
        differences = self._pairs[:, 0].sub_(self._pairs[:, 1])
        for half, (one, other) in enumerate((sums, differences)):
            torch.add(one, other, out=out[half])
            torch.sub(one, other, out=out[2 + half])


def _by_numpy(function: np.ufunc, values: torch.Tensor, out: torch.Tensor) -> None:
    function(values.numpy(), out=out.numpy())


def _by_torch(function: Callable[..., torch.Tensor], values: torch.Tensor, out: torch.Tensor) -> None:
    function(values, out=out)


_BY_NUMPY = tuple(partial(_by_numpy, function) for function in (np.log, np.cos, np.sin))
_BY_TORCH = tuple(partial(_by_torch, function) for function in (torch.log, torch.cos, torch.sin))


@cache
def _functions() -> tuple[Function, ...]:
    """Logarithm, cosine and sine: NumPy's, or PyTorch's where its logarithm is faster.

    With AVX-512 NumPy's take a third of the time of PyTorch's; without, its logarithm goes value by value.
    """
    values, out = torch.linspace(0.5, 1.0, 2 * _CHUNK, dtype=torch.float64).tensor_split(2)
    taken = []
    for log, *_ in (_BY_NUMPY, _BY_TORCH):
        log(values, out)
        started = time.perf_counter()
        log(values, out)
        taken.append(time.perf_counter() - started)
    return _BY_NUMPY if taken[0] < taken[1] else _BY_TORCH


def noisy(
    total: torch.Tensor, scale: float, generator: NoiseSource, *, divisor: float = 1.0, in_place: bool = False
) -> torch.Tensor:
    """(``total`` plus Gaussian noise of standard deviation ``scale``) / ``divisor``, in the type of ``total``.

    The sum is formed in float64 and rounded to multiples of about ``scale`` / 2^12. On this grid, outputs no longer
    show which floating-point numbers the sum before the noise could have been (Mironov 2012,
    https://doi.org/10.1145/2382196.2382264); the rounding adds 5e-9 of the noise's variance. ``in_place`` writes over
    ``total``, which must lie in one piece: nothing without noise is left then.
    """
    grid = 2.0 ** (math.floor(math.log2(scale)) - GRID_BITS)  # a power of two: scaling by it is exact
    flat = total.detach().view(-1) if in_place else total.detach().reshape(-1)
    out = flat if in_place else torch.empty_like(flat)
    # In pieces that stay in the cache; on another device in one piece, because each costs a transfer.
    piece = SUMMED * _CHUNK if flat.device.type == "cpu" else max(1, flat.numel())
    for start in range(0, flat.numel(), piece):
        part = slice(start, start + piece)
        noise = generator.normal(flat[part].numel()).mul_(scale / grid).to(flat.device)
        torch.mul(noise.add_(flat[part], alpha=1 / grid).round_(), grid / divisor, out=out[part])
    return out.view_as(total)
