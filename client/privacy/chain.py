"""A durable, append-only chain of JSON rows: each row names the hash of the one before, damage is found and named.

A row is first announced in full in ``<name>.head`` (written beside, fsynced, renamed) and then appended. A crash at any
instant therefore leaves the whole row on disk or no trace of it: a torn last row is completed from its announcement,
and rows missing from the end are noticed, because the announcement names one that is not there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medfl.shared.errors import PolicyRefusal
from medfl.shared.files import PRIVATE_FILE, private_folder, sync_folder, write_whole

Row = dict[str, Any]
GENESIS = "0" * 64
MAX_ROW_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Head:
    """How long a chain is and the hash of its last row: enough to notice later that rows were lost or changed."""

    rows: int
    digest: str


class Chain:
    """One open chain. The file stays locked for this process until :meth:`close`.

    Raises:
        PolicyRefusal: reason ``ledger busy`` when another process holds it, ``ledger damaged`` when a row is not as
            it was written, ``ledger unwritable`` when the disk refuses.
    """

    def __init__(self, path: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._path, self._clock = path, clock
        self._announcement = path.with_name(path.name + ".head")
        self.rows: list[Row] = []
        self._usable = True
        try:
            private_folder(path.parent)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, PRIVATE_FILE)
            sync_folder(path.parent)
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise PolicyRefusal(
                    f"{path} is in use by another process: stop the other medfl-client that uses this state folder",
                    reason="ledger busy",
                ) from None
            self._load()
        except BaseException:
            os.close(self._file)
            raise

    @property
    def head(self) -> Head:
        """Of the rows that are durable now."""
        return Head(len(self.rows), self.rows[-1]["hash"] if self.rows else GENESIS)

    def holds(self, head: Head) -> bool:
        """Whether this chain is ``head``'s chain or an extension of it."""
        if head.rows == 0:
            return head.digest == GENESIS
        return head.rows <= len(self.rows) and self.rows[head.rows - 1]["hash"] == head.digest

    def append(self, body: Mapping[str, Any]) -> Row:
        """Add a row and return it once it is durable. Times never run backwards along the chain.

        Raises:
            PolicyRefusal: reason ``ledger unwritable``; no row was lost, and this one counts as not written.
        """
        if not self._usable:
            raise _unwritable(self._path, OSError("an earlier write failed"))
        now = self._clock().astimezone(UTC).isoformat(timespec="seconds")
        latest = self.rows[-1]["time"] if self.rows else now
        row: Row = {**body, "row": len(self.rows) + 1, "previous": self.head.digest, "time": max(now, latest)}
        if now < latest:
            row["clock_said"] = now  # the machine's clock jumped back; spending does not depend on it
        row["hash"] = _digest(row)
        line = _line(row)
        if len(line) > MAX_ROW_BYTES:
            raise ValueError("a ledger row must stay small")  # a mistake of the caller, not of the site
        try:
            write_whole(self._announcement, line)
            self._write(line)
        except OSError as error:
            raise _unwritable(self._path, error) from None
        self.rows.append(row)
        return row

    def close(self) -> None:
        """Unlock and close; a second call does nothing. Every row is durable already."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self._usable = -1, False

    def _write(self, line: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError:
            try:
                os.ftruncate(self._file, size)
                os.fsync(self._file)
            except OSError:
                self._usable = False  # a torn row may stand at the end: the next start completes it
            raise

    def _load(self) -> None:
        content = self._path.read_bytes()
        *lines, torn = content.split(b"\n")
        for line in lines:
            self.rows.append(self._checked(line))
        whole = len(content) - len(torn)
        announced = self._announced()
        if announced is None:
            if content:
                raise self._damaged(f"{self._announcement.name} is missing, so lost rows could not be noticed")
        elif announced["row"] == len(self.rows) and announced["hash"] == self.head.digest:
            if torn:
                raise self._damaged(f"row {len(self.rows) + 1} is torn and was never announced")
        elif announced["row"] == len(self.rows) + 1 and announced["previous"] == self.head.digest:
            if not _line(announced).startswith(torn):
                raise self._damaged(f"row {len(self.rows) + 1} is torn and differs from its announcement")
            try:
                os.ftruncate(self._file, whole)
                self._write(_line(announced))
            except OSError as error:
                raise _unwritable(self._path, error) from None
            self.rows.append(announced)
        else:
            raise self._damaged(f"it has {len(self.rows)} whole rows, and row {announced['row']} was written last")

    def _checked(self, line: bytes) -> Row:
        number = len(self.rows) + 1
        row = _parsed(line)
        if row is None or row.get("row") != number or row.get("hash") != _digest(row):
            raise self._damaged(f"row {number} is not as it was written")
        if row.get("previous") != self.head.digest:
            raise self._damaged(
                f"row {number} does not follow row {number - 1}: a row was changed, removed or inserted"
            )
        return row

    def _announced(self) -> Row | None:
        try:
            line = self._announcement.read_bytes()
        except FileNotFoundError:
            return None
        row = _parsed(line.removesuffix(b"\n"))
        if row is None or row.get("hash") != _digest(row) or not isinstance(row.get("row"), int):
            raise self._damaged(f"{self._announcement.name} is not as it was written")
        return row

    def _damaged(self, what: str) -> PolicyRefusal:
        return PolicyRefusal(
            f"{self._path}: {what}. Nothing is trained until the newest backup of this folder is restored; "
            "keep the damaged files, they are evidence",
            reason="ledger damaged",
        )


def _unwritable(path: Path, error: OSError) -> PolicyRefusal:
    why = error.strerror or str(error)
    return PolicyRefusal(
        f"{path} cannot be written ({why}): free disk space or repair permissions. No row was lost, nothing released",
        reason="ledger unwritable",
    )


def _line(row: Row) -> bytes:
    return json.dumps(row, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _digest(row: Row) -> str:
    return hashlib.sha256(_line({key: value for key, value in row.items() if key != "hash"})).hexdigest()


def _parsed(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    # A row that parses to the same content but other bytes was edited too.
    return row if isinstance(row, dict) and _line(row) == line + b"\n" else None
