"""Noise and sampling nobody can predict: AES-256 in counter mode, keyed by the operating system, hardened Gaussians.

A seed in a study, a call of ``torch.manual_seed`` or MONAI's ``set_determinism`` does not reach this generator.
"""

from __future__ import annotations

import math
import os
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

# Gaussians added up for one sample: one alone can be inverted from its low bits. Two is what the authors' own library
# (IBM diffprivlib) adds; the low bits that are left are cut off by :func:`noisy`.
# Source: Holohan & Braghin 2021, https://arxiv.org/abs/2107.10138, section 5.
SUMMED = 2

_PAIRS = 4096  # per chunk and summand: the working set stays in the L2 cache


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
        self._zeros = bytes(2 * SUMMED * _PAIRS * 8)
        self._block = bytearray(len(self._zeros) + 15)  # update_into wants one cipher block of slack
        self._uniform = torch.empty(2, SUMMED, _PAIRS, dtype=torch.float64)
        self._cosines = torch.empty(SUMMED, _PAIRS, dtype=torch.float64)
        self._ready = torch.empty(2 * _PAIRS, dtype=torch.float64)
        self._given = len(self._ready)  # how many of the ready normals were given out

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
        done = 0
        while done < count:
            if self._given == len(self._ready):
                self._refill()
            part = self._ready[self._given : self._given + count - done]
            out[done : done + len(part)] = part
            part.zero_()  # noise of a release must not be found in memory later
            self._given += len(part)
            done += len(part)
        return out

    def _refill(self) -> None:
        """Make ``2 * _PAIRS`` fresh normals ready: from each pair of uniforms one by cosine and one by sine."""
        self._stream.update_into(self._zeros, self._block)
        words = np.frombuffer(self._block, dtype=np.uint64, count=2 * SUMMED * _PAIRS).reshape(2, SUMMED, _PAIRS)
        uniform = self._uniform.numpy()
        # 52 random bits as the fraction of a double between 1 and 2.
        np.right_shift(words, 12, out=uniform.view(np.uint64))
        np.bitwise_or(uniform.view(np.uint64), 0x3FF0000000000000, out=uniform.view(np.uint64))
        radius = uniform[0]
        np.subtract(2.0, radius, out=radius)  # above 0, at most 1
        np.log(radius, out=radius)
        radius *= -2.0 / SUMMED  # a sum of SUMMED standard normals has variance SUMMED
        np.sqrt(radius, out=radius)
        lengths, angles = self._uniform[0], self._uniform[1].mul_(2 * math.pi)
        torch.cos(angles, out=self._cosines).mul_(lengths)
        torch.sum(self._cosines, 0, out=self._ready[:_PAIRS])
        torch.sum(angles.sin_().mul_(lengths), 0, out=self._ready[_PAIRS:])
        self._given = 0


def noisy(total: torch.Tensor, scale: float, generator: NoiseSource) -> torch.Tensor:
    """``total`` plus Gaussian noise of standard deviation ``scale``, float64, as multiples of about ``scale`` / 2^20.

    On the grid, outputs no longer show which floating-point numbers the sum before the noise could have been
    (Mironov 2012, https://doi.org/10.1145/2382196.2382264); rounding adds 1e-13 of the noise's variance.
    """
    grid = 2.0 ** (math.floor(math.log2(scale)) - 20)  # a power of two: scaling by it is exact
    noise = generator.normal(total.numel()).mul_(scale / grid).to(total.device)
    return noise.add_(total.detach().reshape(-1), alpha=1 / grid).round_().mul_(grid).view_as(total)
