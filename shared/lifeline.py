"""Child processes that end with their parent, however it ends: the kernel sees to it (Linux, PR_SET_PDEATHSIG)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_SET_SIGNAL_AT_PARENTS_DEATH = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def ending_with_us() -> Callable[[], None]:
    """What ``subprocess`` is to call in the child (``preexec_fn``): SIGKILL when the thread that starts it has ended.

    Elsewhere than on Linux it does nothing.
    """
    parent = os.getpid()

    def in_child() -> None:
        if _LIBC is None:
            return
        _LIBC.prctl(_SET_SIGNAL_AT_PARENTS_DEATH, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it had died before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)

    return in_child
