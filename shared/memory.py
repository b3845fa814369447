"""What glibc's allocator does with freed memory: kept for the next batch, or back to the operating system."""

from __future__ import annotations

import ctypes
import logging
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_LARGE = 1 << 20  # bytes; pieces of an upload have five times as many
_LARGEST = 1 << 25  # glibc takes no larger threshold for mapping
_NEVER = (1 << 31) - 1
_ARENAS = 2

log = logging.getLogger("medfl.memory")


def give_back_large_buffers() -> bool:
    """Map each buffer of 1 MiB or more by itself, so that it leaves when it is freed; whether that could be set.

    For the whole process. By itself the allocator learns from the first freed upload to keep such buffers in its heaps,
    of which every thread may have one: the coordinator of a large model then holds far more than it uses.
    """
    return _set(_M_MMAP_THRESHOLD, _LARGE) and _set(_M_ARENA_MAX, _ARENAS)


def keep_freed_buffers() -> bool:
    """Let what one training step frees be there for the next; whether that could be set. For the whole process.

    By itself the allocator gives the end of its heap back after each step, and the system fills it with zeros again at
    the next: up to a sixth of a step on a CPU.
    """
    return _set(_M_MMAP_THRESHOLD, _LARGEST) and _set(_M_TRIM_THRESHOLD, _NEVER)


def give_back_freed_buffers() -> None:
    """Give all that is free back to the operating system now: for a process that will wait."""
    if (trim := getattr(_library(), "malloc_trim", None)) is not None:
        trim(0)


def _set(option: int, value: int) -> bool:
    mallopt = getattr(_library(), "mallopt", None)
    if mallopt is None:
        log.debug("this C library has no mallopt: freed buffers stay or go as it likes")
        return False
    return bool(mallopt(option, value))


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except OSError:
        return None
