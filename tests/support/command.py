"""The commands as processes, forked from one that has imported everything: a start takes tenths of a second, not five.

What runs in them are the commands, with a memory, files and connections of their own.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path


class Command:
    """``medfl-server`` or ``medfl-client`` as a process, its output appended to ``log``."""

    def __init__(self, module: str, arguments: list[str], log: Path) -> None:
        self._process = _FORKS.Process(target=_run, args=(module, arguments, str(log)))
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit status once it has ended, or None when it has not within ``seconds``."""
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self) -> int:
        """SIGKILL; the exit status."""
        self._process.kill()
        return self._wait()

    def stop(self) -> int:
        """SIGTERM, and SIGKILL where that does not help; the exit status."""
        self._process.terminate()
        self._process.join(60)
        return self.kill() if self._process.exitcode is None else self._wait()

    def _wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def said(module: str, *arguments: str | Path) -> tuple[int, str]:
    """What a command that ends says, on standard output and error, with its exit status first."""
    with tempfile.NamedTemporaryFile("r") as file:
        status = Command(module, [str(argument) for argument in arguments], Path(file.name)).wait(240)
        assert status is not None, "it did not end within 240 s"
        return status, file.read()


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["command_imports"])
for _name, _value in {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}.items():
    os.environ.setdefault(_name, _value)  # the process that forks takes its path from there


def _run(module: str, arguments: list[str], log: str) -> None:
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.exit(importlib.import_module(module).main(arguments))
