"""What the audit logs of sites and coordinator have in common: the file, and what to do when it is damaged."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from medfl.shared.chain import Chain, Role, Row
from medfl.shared.errors import ConfigError, PolicyRefusal

_AUDIT = Role(
    "audit log",
    "Nothing runs until all its files are moved to a safe place (keep them, they are evidence): a new log begins then",
)


def audit_file(state: Path) -> Path:
    """Where the audit log of a state folder is."""
    return state / "audit.jsonl"


def open_audit_log(
    path: Path, *, clock: Callable[[], datetime], look: Callable[[Row], None] = lambda row: None
) -> Chain:
    """The log at ``path``, to be written by this process alone; ``look`` is shown every row.

    Raises:
        ConfigError: another process holds it. PolicyRefusal: reasons ``audit log damaged``, ``audit log unwritable``.
    """
    try:
        return Chain(path, _AUDIT, clock=clock, keep_rows=False, look=look)
    except PolicyRefusal as refusal:
        if refusal.reason == f"{_AUDIT.name} busy":
            raise ConfigError(str(refusal)) from None
        raise
