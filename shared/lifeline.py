"""A process that ends with its parent, however that ends: the kernel sees to it (Linux, PR_SET_PDEATHSIG).

``python -m medfl.shared.lifeline PARENT MODULE ARGUMENT...`` is ``python -m MODULE ARGUMENT...`` with a lifeline. The
child asks for it: code that runs between fork and exec can hang where the parent has threads.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_SET_SIGNAL_AT_PARENTS_DEATH = 1


def end_with(parent: int) -> None:
    """From now on, this process is killed as soon as the thread of ``parent`` (its id) that started it has ended.

    Elsewhere than on Linux it does nothing.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_SET_SIGNAL_AT_PARENTS_DEATH, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it had died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def with_lifeline(module: str, *arguments: str) -> list[str]:
    """The command that runs ``module`` as a child that ends with this process."""
    return [sys.executable, "-m", "medfl.shared.lifeline", str(os.getpid()), module, *arguments]


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
