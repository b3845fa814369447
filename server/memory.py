"""Large buffers go back to the operating system when they are freed, so that uploads do not leave a process swollen."""

from __future__ import annotations

import ctypes
import logging

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of glibc's malloc.h
_LARGE = 1 << 20  # bytes; pieces of an upload have five times as many
_ARENAS = 2

log = logging.getLogger("medfl.server")


def give_back_large_buffers() -> bool:
    """Tell glibc's allocator to map each buffer of 1 MiB or more by itself; whether it did. For the whole process.

    By itself it learns from the first freed upload to keep such buffers in its heaps, of which every thread may have
    one: the coordinator of a large model then holds far more than it uses.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        log.debug("this C library has no mallopt: freed buffers may stay with the process")
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE) and mallopt(_M_ARENA_MAX, _ARENAS))
