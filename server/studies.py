"""The coordinator's studies: signed, on its disk, in the order in which they were submitted, each with its state.

``studies/DIGEST/study.signed`` is what sites get, ``record.json`` what became of it. Both are whole or absent.
"""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import Field, ValidationError

from medfl.shared.config import Settings
from medfl.shared.errors import ConfigError, ProtocolError
from medfl.shared.files import private_folder, write_whole
from medfl.shared.signing import Document, Signed
from medfl.shared.study import Study


class State(StrEnum):
    """Where a study stands."""

    WAITING = "waiting"  # for its turn; after a restart also what was running
    RUNNING = "running"
    STOPPED = "stopped"  # by a person; its checkpoint is kept
    ENDED = "ended"  # the reason says how


class Record(Settings):
    """What became of a study."""

    number: int = Field(ge=1)  # of submission: the lowest waiting one is next
    state: State = State.WAITING
    reason: str = ""  # of the end
    round: int = Field(default=0, ge=0)  # the last complete one, when it stopped or ended
    submitted: datetime.datetime
    changed: datetime.datetime


@dataclass(frozen=True, slots=True)
class Entry:
    """One study of the store."""

    study: Study
    signature: bytes
    record: Record

    @property
    def digest(self) -> str:
        """The study's."""
        return self.study.digest


class StudyStore:
    """All studies that were ever submitted. Read from the disk each time, so that every process sees the same."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "studies"

    def add(self, signed: Signed) -> Entry:
        """Keep a study whose signature has been checked, after all others; one that is there stays as it is.

        Raises:
            ProtocolError: the content is no study.
        """
        study = study_in(signed)
        if (known := self.find(study.digest)) is not None:
            return known
        folder = private_folder(self._folder / study.digest)
        write_whole(folder / "study.signed", signed.to_bytes())
        number = 1 + max((entry.record.number for entry in self.entries()), default=0)
        now = _now()
        self._write(study.digest, Record(number=number, submitted=now, changed=now))  # last: with it the study counts
        return self.entry(study.digest)

    def entries(self) -> list[Entry]:
        """Every study, in order of submission. One whose files are damaged is an error, not forgotten.

        Raises:
            ConfigError: a file is damaged.
        """
        if not self._folder.is_dir():
            return []
        found = [self._read(place.name) for place in self._folder.iterdir()]
        return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.record.number)

    def find(self, digest: str) -> Entry | None:
        """The study with ``digest``, or None where there is none. Raises ConfigError where its files are damaged."""
        return self._read(digest)

    def entry(self, digest: str) -> Entry:
        """The study with ``digest``. Raises ConfigError when there is none."""
        found = self.find(digest)
        if found is None:
            raise ConfigError(f"no study with the digest {digest[:12]} was submitted here")
        return found

    def next(self) -> Entry | None:
        """The study whose turn it is: one that a killed coordinator left running, else the first that waits."""
        due = [entry for entry in self.entries() if entry.record.state in (State.WAITING, State.RUNNING)]
        return min(due, key=lambda e: (e.record.state is not State.RUNNING, e.record.number), default=None)

    def mark(self, digest: str, state: State, reason: str = "", *, round_number: int = 0) -> Entry:
        """Note durably what became of a study."""
        record = self.entry(digest).record
        changes = {"state": state, "reason": reason, "round": round_number, "changed": _now()}
        self._write(digest, record.model_copy(update=changes))
        return self.entry(digest)

    def _write(self, digest: str, record: Record) -> None:
        write_whole(self._folder / digest / "record.json", record.model_dump_json(indent=1).encode())

    def _read(self, digest: str) -> Entry | None:
        folder = self._folder / digest
        try:
            record = Record.model_validate_json((folder / "record.json").read_bytes())
            signed = Signed.parse((folder / "study.signed").read_bytes())
            return Entry(Study.from_canonical(signed.unverified, digest=digest), signed.signature, record)
        except FileNotFoundError:
            return None  # killed before it counted: whoever submitted it was told nothing
        except (OSError, ValidationError, ProtocolError):
            raise ConfigError(
                f"{folder}: cannot be read: restore it from a backup, or move it away and submit the study again"
            ) from None


def study_in(signed: Signed) -> Study:
    """The study in a document whose signature has been checked. Raises ProtocolError."""
    if signed.document is not Document.STUDY:
        raise ProtocolError(f"a signed {signed.document.value} is no study")
    return Study.from_canonical(signed.unverified, digest=hashlib.sha256(signed.unverified).hexdigest())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)
