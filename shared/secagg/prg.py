"""Masks: key streams of AES-256-CTR added to a vector in place, block by block.

The counter starts at 0 for the vector and at 2^127 for the scalars, so that one key serves both without overlap. All
keys are applied to one block before the next is touched: the vector is read and written once, however many masks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_BLOCK_BYTES = 1 << 18  # key stream and vector block stay in the second-level cache
_AES_BLOCK = 16
_SCALAR_COUNTER = 1 << 127
_WORTH_A_THREAD = 1 << 22  # bytes; below, starting threads costs more than it saves
_ZEROS = bytes(_BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Mask:
    """One key stream (``key``: 32 bytes) and whether it is added or taken away."""

    key: bytes
    subtract: bool = False

    def inverted(self) -> Mask:
        """The mask that takes this one away."""
        return Mask(self.key, not self.subtract)


def usable_threads() -> int:
    """2 where the process may use two cores or more, else 1."""
    return min(2, len(os.sched_getaffinity(0)))


def add_masks(vector: NDArray[Any], masks: Sequence[Mask], *, threads: int = 1) -> None:
    """Add every mask to ``vector`` modulo 2^(its bits), in place.

    Extra memory is two blocks of 256 KiB a thread.

    Args:
        vector: uint16 or uint32, one axis, C-contiguous.
        masks: applied in any order; the result does not depend on it.
        threads: 1 or more; each takes a contiguous part.
    """
    per_block = _BLOCK_BYTES // vector.itemsize
    parts = max(1, min(threads, vector.nbytes // _WORTH_A_THREAD))
    blocks = -(-vector.size // per_block)
    bounds = [min(vector.size, (blocks * part // parts) * per_block) for part in range(parts)] + [vector.size]
    if parts == 1:
        _add(vector, masks, 0)
        return
    with ThreadPoolExecutor(parts) as pool:
        jobs = [
            pool.submit(_add, vector[start:end], masks, start * vector.itemsize // _AES_BLOCK)
            for start, end in pairwise(bounds)
        ]
        for job in jobs:
            job.result()


def add_scalar_masks(scalars: NDArray[np.uint64], masks: Sequence[Mask]) -> None:
    """Add every mask's scalar key stream to ``scalars`` (uint64) modulo 2^64, in place."""
    _add(scalars, masks, _SCALAR_COUNTER)


def random_words(count: int, key: bytes) -> NDArray[np.uint32]:
    """``count`` uniform uint32 from the key stream of ``key``; for randomness that is used once."""
    words = np.zeros(count, np.uint32)
    _add(words, [Mask(key)], 0)
    return words


def _add(vector: NDArray[Any], masks: Sequence[Mask], counter: int) -> None:
    start = modes.CTR(counter.to_bytes(_AES_BLOCK, "big"))
    streams = [(Cipher(algorithms.AES(mask.key), start).encryptor(), mask.subtract) for mask in masks]
    per_block = _BLOCK_BYTES // vector.itemsize
    key_stream = np.empty(min(per_block, vector.size), vector.dtype)
    for begin in range(0, vector.size, per_block):
        block = vector[begin : begin + per_block]
        words = key_stream[: block.size]
        zeros, target = memoryview(_ZEROS)[: block.nbytes], memoryview(words).cast("B")  # type: ignore[arg-type]
        for stream, subtract in streams:
            stream.update_into(zeros, target)
            (np.subtract if subtract else np.add)(block, words, out=block)
