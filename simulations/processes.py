"""The commands as child processes: started, watched, stopped, whatever happens to the parent."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from medfl.shared.lifeline import with_lifeline

_GRACE_S = 20.0


class Processes:
    """``with Processes() as running: running.start(...)``; leaving stops them all: SIGTERM, then SIGKILL.

    They end with the thread that started them, too, when it is killed.
    """

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()

    def start(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start ``python -m module arguments`` with its output appended to ``log``."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                with_lifeline(module, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C reaches the parent only, which then stops them in order
            )
        self._running[name] = process
        return process

    def failed(self) -> dict[str, int]:
        """Exit status of each process that has ended with one that is not 0."""
        return {name: code for name, process in self._running.items() if (code := process.poll())}

    def stop_all(self) -> dict[str, int]:
        """Ask all that still run to end, wait, kill what does not; returns every exit status."""
        for process in self._running.values():
            if process.poll() is None:
                process.terminate()
        codes = {}
        for name, process in self._running.items():
            try:
                codes[name] = process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                codes[name] = process.wait()
        return codes
