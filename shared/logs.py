"""What the commands write to their logs: one line an event, plain or JSON, no third-party chatter."""

from __future__ import annotations

import io
import json
import logging
import logging.handlers
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from medfl.shared.errors import ConfigError
from medfl.shared.files import PRIVATE_FILE

_URGENCIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))  # syslog(3)
_FILE_BYTES = 10_000_000
_FILES_KEPT = 5

_QUIET = (
    "absl",
    "flwr",
    "httpx",
    "httpcore",
    "pydicom",
    "pynetdicom",
    "highdicom",
    "monai",
    "PIL",
    "uvicorn",
    "alembic",
)
"""Libraries whose messages are noise here, or may carry identifiers (pydicom and pynetdicom quote headers)."""


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        return json.dumps(entry)


class _Journal(logging.Formatter):
    """For systemd's journal, which has the time itself and reads the urgency from ``<N>`` (sd-daemon(3))."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        urgency = next(number for level, number in _URGENCIES if record.levelno >= level)
        return "\n".join(f"<{urgency}>{line}" for line in self._inner.format(record).splitlines())


class _Besides(logging.FileHandler):
    """A file beside standard error: a disk that is full or gone costs lines here, and nothing else."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class StudyLog(_Besides):
    """What is logged while a study runs, in its folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.setFormatter(_lines(False, clock=None))


class _PrivateFile(_Besides, logging.handlers.RotatingFileHandler):
    """Rotated at 10 MB, five older ones kept, readable by this account only."""

    def _open(self) -> io.TextIOWrapper:
        handle = os.open(self.baseFilename, os.O_CREAT | os.O_WRONLY | os.O_APPEND, PRIVATE_FILE)
        return open(handle, "a", encoding="utf-8")


def set_up_logs(
    *,
    json_lines: bool = False,
    verbose: bool = False,
    stream: TextIO | None = None,
    file: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Send MedFL's log to ``stream`` (standard error by default), also to ``file``, and keep the libraries quiet.

    Raises:
        ConfigError: ``file`` cannot be written.
    """
    stream = stream or sys.stderr
    shown = logging.StreamHandler(stream)
    journal = _is_journal(stream, environment)
    shown.setFormatter(_Journal(_lines(json_lines, "%(message)s")) if journal else _lines(json_lines))
    handlers: list[logging.Handler] = [shown]
    if file is not None:
        try:
            kept = _PrivateFile(file, maxBytes=_FILE_BYTES, backupCount=_FILES_KEPT, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--log-file {file}: cannot be written ({error.strerror})") from None
        kept.setFormatter(_lines(json_lines, "%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
        handlers.append(kept)
    root = logging.getLogger("medfl")
    for old in root.handlers:
        if isinstance(old, _PrivateFile):
            old.close()
    root.handlers[:] = handlers
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False
    quiet_libraries()


def _lines(
    json_lines: bool, text: str = "%(asctime)s %(levelname)-7s %(message)s", clock: str | None = "%H:%M:%S"
) -> logging.Formatter:
    return _JsonLines() if json_lines else logging.Formatter(text, clock)


def _is_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether ``stream`` is the very file that systemd connected to its journal (``JOURNAL_STREAM``)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def quiet_libraries() -> None:
    """Nothing of the libraries passes: what goes wrong in them reaches us as an exception."""
    for name in _QUIET:
        logger = logging.getLogger(name)
        logger.setLevel(logging.CRITICAL)
        logger.propagate = False
        logger.handlers[:] = [logging.NullHandler()]
