"""What the commands write to their logs: one line an event, plain or JSON, no third-party chatter."""

from __future__ import annotations

import json
import logging
import sys
from typing import TextIO

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


def set_up_logs(*, json_lines: bool = False, verbose: bool = False, stream: TextIO | None = None) -> None:
    """Send MedFL's log to ``stream`` (standard error by default) and keep the libraries quiet."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        _JsonLines() if json_lines else logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger("medfl")
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False
    quiet_libraries()


def quiet_libraries() -> None:
    """Nothing of the libraries passes: what goes wrong in them reaches us as an exception."""
    for name in _QUIET:
        logger = logging.getLogger(name)
        logger.setLevel(logging.CRITICAL)
        logger.propagate = False
        logger.handlers[:] = [logging.NullHandler()]
