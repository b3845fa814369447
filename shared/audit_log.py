"""What the audit logs of sites and coordinator have in common: the file, its inspection, its rows as a table."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path

from medfl.shared.chain import Chain, Inspection, Role, Row, inspect
from medfl.shared.errors import ConfigError, PolicyRefusal

_AUDIT = Role(
    "audit log",
    "Nothing runs until all its files are moved to a safe place (keep them, they are evidence): a new log begins then",
)
_PATIENCE_S = 1.0


def audit_file(state: Path) -> Path:
    """Where the audit log of a state folder is."""
    return state / "audit.jsonl"


def open_audit_log(
    path: Path, *, clock: Callable[[], datetime], look: Callable[[Row], None] = lambda row: None
) -> Chain:
    """The log at ``path``, to be written by this process alone; ``look`` is shown every row.

    A command that writes its row and ends is waited for.

    Raises:
        ConfigError: another process holds it. PolicyRefusal: reasons ``audit log damaged``, ``audit log unwritable``.
    """
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return Chain(path, _AUDIT, clock=clock, keep_rows=False, look=look)
        except PolicyRefusal as refusal:
            if refusal.reason != f"{_AUDIT.name} busy":
                raise
            if time.monotonic() > until:
                raise ConfigError(str(refusal)) from None
        time.sleep(0.05)


def inspected(path: Path) -> Inspection:
    """Look at the log at ``path``, also while the node writes. Raises ConfigError where there is none."""
    found = inspect(path)
    if not found.rows and found.problem is None:
        raise ConfigError(f"{path}: there is no audit log: the node begins it at its first start")
    return found


def verified(path: Path, *, head: str | None = None) -> list[str]:
    """What to tell of an unbroken log, a sentence or a hash each.

    Raises:
        PolicyRefusal: a row was changed, removed or inserted, or none has the hash ``head`` from an earlier report.
    """
    found = inspected(path)
    if found.problem is not None:
        raise PolicyRefusal(
            f"{path}: {found.problem}. The {len(found.rows)} rows before that are as they were written. "
            "Keep both files, they are evidence",
            reason="audit log damaged",
        )
    lines = [
        f"{len(found.rows)} rows are as they were written",
        f"  first of {found.rows[0]['time']}",
        f"  last  of {found.rows[-1]['time']}, with the hash",
        f"  {found.head.digest}",
    ]
    if head is None:
        return [*lines, "keep that hash elsewhere: audit verify --head HASH then finds a log that was written anew"]
    number = next((number for number, row in enumerate(found.rows, start=1) if row["hash"] == head), None)
    if number is None:
        raise PolicyRefusal(
            f"{path}: no row has the hash {head}: the log was cut or written anew after that hash was noted. "
            "Keep both files, they are evidence",
            reason="audit log damaged",
        )
    return [*lines, f"row {number} of {found.rows[number - 1]['time']} has the noted hash: nothing before it changed"]


def rows_as_csv(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """``rows`` for a spreadsheet, in these columns."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def _cell(value: object) -> object:
    # A spreadsheet takes such a text for a formula. No row of ours begins so; one that somebody forged might.
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
