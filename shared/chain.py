"""A durable, append-only chain of JSON rows: each row names the hash of the one before, damage is found and named.

Rows are first announced in full in ``<name>.head`` (written beside, fsynced, renamed) and then appended. A crash at any
instant therefore leaves all of them on disk or no trace: torn last rows are completed from their announcement,
and rows missing from the end are noticed, because the announcement names one that is not there.

Whoever may write both files can write another history. Against that, the hash of the last row is kept elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medfl.shared.errors import DiskRefusal, PolicyRefusal
from medfl.shared.files import PRIVATE_FILE, private_folder, sync_folder, write_whole

Row = dict[str, Any]
GENESIS = "0" * 64
_DIGEST_BYTES = 32  # SHA-256
MAX_ROW_BYTES = 64 * 1024
_LOOKS, _LOOK_AGAIN_S = 50, 0.02  # at a chain that another process is writing: a row takes some 20 ms


@dataclass(frozen=True, slots=True)
class Role:
    """What a chain is for, as messages and the reasons of refusals say it."""

    name: str  # "ledger": reasons are then "ledger busy", "ledger damaged", "ledger unwritable"
    when_damaged: str  # what a person does then, as one sentence


@dataclass(frozen=True, slots=True)
class Head:
    """How long a chain is and the hash of its last row: enough to notice later that rows were lost or changed."""

    rows: int
    digest: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a look at a chain's files found: the rows up to the first damage, and that damage in words."""

    rows: list[Row]
    problem: str | None

    @property
    def head(self) -> Head:
        """Of the rows that are as they were written."""
        return Head(len(self.rows), self.rows[-1]["hash"] if self.rows else GENESIS)


def inspect(path: Path) -> Inspection:
    """Look at a chain without its lock and without changing it, also while another process appends to it.

    Absent files are a chain without rows.

    Raises:
        OSError: the files cannot be read.
    """
    for _ in range(_LOOKS):
        rows: list[Row] = []
        announcement = _bytes_of(_announcement_of(path))
        found = _examine(path, announcement, see=rows.append)
        if found.problem is None or announcement == _bytes_of(_announcement_of(path)):
            break
        time.sleep(_LOOK_AGAIN_S)  # a row was written meanwhile: the two files were not of one moment
    return Inspection([*rows, *found.pending], found.problem)


class Chain:
    """One open chain. The file stays locked for this process until :meth:`close`.

    Raises:
        PolicyRefusal: reason ``ROLE busy`` when another process holds it, ``ROLE damaged`` when a row is not as
            it was written.
        DiskRefusal: reason ``ROLE unwritable``.
    """

    def __init__(
        self,
        path: Path,
        role: Role,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        keep_rows: bool = True,
        look: Callable[[Row], None] = lambda row: None,
    ) -> None:
        """``look`` is shown each row: those that are there, and every new one once it is durable.

        It sees rows of a damaged chain too, before the damage is found and nothing comes of the chain.
        """
        self._path, self._role, self._clock = path, role, clock
        self._announcement = _announcement_of(path)
        self.rows: list[Row] = []  # empty for whom only writes: a log of years need not be in memory
        self._keep_rows, self._look = keep_rows, look
        self._digests = bytearray()  # of all rows, one after the other
        self._latest = ""  # time of the last row
        self._usable = True
        try:
            private_folder(path.parent)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, PRIVATE_FILE)
            sync_folder(path.parent)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise PolicyRefusal(
                    f"{path} is in use by another process: stop the other process that uses this state folder",
                    reason=f"{role.name} busy",
                ) from None
            self._load()
        except BaseException:
            os.close(self._file)
            raise

    @property
    def head(self) -> Head:
        """Of the rows that are durable now."""
        return Head(len(self._digests) // _DIGEST_BYTES, self._digests[-_DIGEST_BYTES:].hex() or GENESIS)

    def holds(self, head: Head) -> bool:
        """Whether this chain is ``head``'s chain or an extension of it."""
        if head.rows == 0:
            return head.digest == GENESIS
        return head.rows <= self.head.rows and _digest_at(self._digests, head.rows) == head.digest

    def append(self, body: Mapping[str, Any]) -> Row:
        """Add a row and return it once it is durable. Times never run backwards along the chain.

        Raises:
            DiskRefusal: reason ``ROLE unwritable``; no row was lost, and this one counts as not written.
        """
        return self.append_all([body])[0]

    def append_all(self, bodies: Sequence[Mapping[str, Any]]) -> list[Row]:
        """Add several rows at the cost of one, all or none of them; see :meth:`append`."""
        if not self._usable:
            raise self._unwritable(OSError("an earlier write failed"))
        rows: list[Row] = []
        for body in bodies:
            rows.append(self._next_row(body, rows[-1] if rows else None))
        if not rows:
            return rows
        lines = [_line(row) for row in rows]
        if max(map(len, lines)) > MAX_ROW_BYTES:
            raise ValueError("a row must stay small")  # a mistake of the caller, not of the site
        try:
            write_whole(self._announcement, b"".join(lines))
            self._write(b"".join(lines))
        except OSError as error:
            raise self._unwritable(error) from None
        self._take(rows)
        return rows

    def _next_row(self, body: Mapping[str, Any], before: Row | None) -> Row:
        now = self._clock().astimezone(UTC).isoformat(timespec="seconds")
        number, previous, latest = self.head.rows, self.head.digest, self._latest or now
        if before is not None:
            number, previous, latest = before["row"], before["hash"], before["time"]
        row: Row = {**body, "row": number + 1, "previous": previous, "time": max(now, latest)}
        if now < latest:
            row["clock_said"] = now  # the machine's clock jumped back; spending does not depend on it
        row["hash"] = _digest(row)
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

    def _take(self, rows: Sequence[Row]) -> None:
        """Count ``rows``, which are durable."""
        for row in rows:
            self._digests += bytes.fromhex(row["hash"])
            self._see(row)

    def _see(self, row: Row) -> None:
        self._latest = row["time"]
        self._look(row)
        if self._keep_rows:
            self.rows.append(row)

    def _load(self) -> None:
        found = _examine(self._path, _bytes_of(self._announcement), see=self._see)
        if found.problem is not None:
            raise PolicyRefusal(
                f"{self._path}: {found.problem}. {self._role.when_damaged}", reason=f"{self._role.name} damaged"
            )
        self._digests = found.digests
        if found.pending:
            try:
                os.ftruncate(self._file, found.whole_bytes)
                self._write(b"".join(map(_line, found.pending)))
            except OSError as error:
                raise self._unwritable(error) from None
            self._take(found.pending)

    def _unwritable(self, error: OSError) -> DiskRefusal:
        why = error.strerror or str(error)
        return DiskRefusal(
            f"{self._path} cannot be written ({why}): free disk space or repair permissions. "
            "No row was lost, nothing released",
            reason=f"{self._role.name} unwritable",
        )


@dataclass(frozen=True, slots=True)
class _Examined:
    digests: bytearray  # of the rows up to the first damage
    whole_bytes: int = 0  # of the file: as far as its last whole row
    pending: Sequence[Row] = ()  # announced, and not wholly in the file yet
    problem: str | None = None


def _examine(path: Path, announcement: bytes | None, *, see: Callable[[Row], None]) -> _Examined:
    """Hold the chain's file against its announcement; ``see`` is shown each row up to the first damage.

    One row at a time is in memory: a log of years is larger than the memory of some machines.
    """
    digests, whole, torn = bytearray(), 0, b""
    last, number = GENESIS, 0
    for line in _lines(path):
        if not line.endswith(b"\n"):
            torn = line
            break
        number += 1
        row = _parsed(line)
        if row is None or row.get("row") != number or row.get("hash") != _digest(row):
            return _Examined(digests, problem=f"row {number} is not as it was written")
        if row.get("previous") != last:
            return _Examined(
                digests,
                problem=f"row {number} does not follow row {number - 1}: a row was changed, removed or inserted",
            )
        last = row["hash"]
        digests += bytes.fromhex(last)
        whole += len(line)
        see(row)
    announced_in = _announcement_of(path).name
    if announcement is None:
        missing = f"{announced_in} is missing, so lost rows could not be noticed"
        return _Examined(digests, problem=missing if number or torn else None)
    announced = _announced(announcement)
    if announced is None:
        return _Examined(digests, problem=f"{announced_in} is not as it was written")
    begins, ends = announced[0]["row"], announced[-1]["row"]
    if not begins <= number + 1 <= ends + 1 or not _continues(digests, announced):
        return _Examined(digests, problem=f"it has {number} whole rows, and row {ends} was written last")
    pending = announced[number + 1 - begins :]
    if not pending:
        return _Examined(digests, problem=f"row {number + 1} is torn and was never announced" if torn else None)
    if not _line(pending[0]).startswith(torn):
        return _Examined(digests, problem=f"row {number + 1} is torn and differs from its announcement")
    return _Examined(digests, whole, pending)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines that a file has now, with their ends; what is appended meanwhile is left for the next look."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        left = os.fstat(file.fileno()).st_size
        while line := file.readline(left):
            left -= len(line)
            yield line


def _announced(announcement: bytes) -> list[Row] | None:
    """The consecutive rows of an announcement, or None where it is not as it was written."""
    rows: list[Row] = []
    for line in announcement.removesuffix(b"\n").split(b"\n"):
        row = _parsed(line + b"\n")
        if row is None or row.get("hash") != _digest(row) or not isinstance(row.get("row"), int):
            return None
        if rows and (row["row"], row["previous"]) != (rows[-1]["row"] + 1, rows[-1]["hash"]):
            return None
        rows.append(row)
    return rows


def _continues(digests: bytearray, announced: Sequence[Row]) -> bool:
    """Whether ``announced`` follow the rows of ``digests``, or are the last of them."""
    begins = announced[0]["row"]
    held = [_digest_at(digests, number) for number in range(begins, len(digests) // _DIGEST_BYTES + 1)]
    before = _digest_at(digests, begins - 1) if begins > 1 else GENESIS
    return before == announced[0]["previous"] and all(
        digest == row["hash"] for digest, row in zip(held, announced, strict=False)
    )


def _digest_at(digests: bytearray, number: int) -> str:
    """Hash of row ``number``, counted from 1; empty where there is none."""
    return digests[(number - 1) * _DIGEST_BYTES : number * _DIGEST_BYTES].hex()


def _announcement_of(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


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
    return row if isinstance(row, dict) and _line(row) == line else None
