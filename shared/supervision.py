"""What systemd is told of a service: ready, alive, stopping (sd_notify(3)). Without systemd nothing happens.

By hand, because it is one datagram, and the packages that send it have had no release for years.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Self

_PATIENCE_S = 2.0  # a supervisor that has ten words waiting does not take another


class Supervision:
    """``with Supervision(alive) as systemd: systemd.ready(); ...`` feeds the watchdog for as long as ``alive()``.

    When ``alive`` says no, or hangs, for the unit's ``WatchdogSec``, systemd ends the process and starts it again.
    """

    def __init__(self, alive: Callable[[], bool], *, environment: Mapping[str, str] = os.environ) -> None:
        self._alive = alive
        self._address = environment.get("NOTIFY_SOCKET", "")
        ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_us = environment.get("WATCHDOG_USEC", "") if ours else ""
        self._period_s = int(watchdog_us) / 1e6 / 3 if watchdog_us.isdigit() else 0.0
        self._done = threading.Event()

    def __enter__(self) -> Self:
        """Begin to feed the watchdog, where the unit asks for one."""
        if self._address and self._period_s > 0:
            threading.Thread(target=self._feed, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Say that the service stops."""
        self._done.set()
        self._send("STOPPING=1")

    def ready(self) -> None:
        """The service has started: units that wait for it may start."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``. It ends up in the journal's metadata: no names, no paths."""
        self._send("STATUS=" + text.replace("\n", " "))

    def _feed(self) -> None:
        while not self._done.wait(self._period_s):
            if self._alive():
                self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(_PATIENCE_S)
                sender.sendto(state.encode(), address)
        except OSError:
            pass  # a supervisor that is gone or does not listen must not end or hold the service
