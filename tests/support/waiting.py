"""Waiting for something to become true in another process."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], object], seconds: float = 180.0) -> None:
    """Return when ``condition()`` is true; fail the test when it is not within ``seconds``."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"it did not happen within {seconds:.0f} s"
        time.sleep(0.05)
