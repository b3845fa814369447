"""What a coordinator's administrator can ask for: submit, list, status, stop, resume; in the running process or not.

While the coordinator runs, commands reach it through its socket, and the same functions are called there. While it
does not, they are called in the command itself, on the same files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Protocol, TypeVar

from pydantic import Field

from medfl.server import audit
from medfl.server.progress import Live, Progress, progress_of
from medfl.server.studies import Entry, State, StudyStore, study_in
from medfl.shared.admin import AdminSocket, Nothing, NotRunning, Verb, ask
from medfl.shared.config import Settings
from medfl.shared.errors import ConfigError
from medfl.shared.signing import Signed
from medfl.shared.study import Study

A = TypeVar("A", bound=Settings)
Q = TypeVar("Q", bound=Settings)


class Submission(Settings):
    """A signed study, as :meth:`medfl.shared.signing.Signed.to_bytes` writes it; ``by``: the account that asks."""

    signed: str
    by: str = Field(max_length=200)


class Named(Settings):
    """One study by its digest; ``by``: the account that asks."""

    digest: str
    by: str = Field(max_length=200)


class Table(Settings):
    """All studies, in order of submission; ``running`` where a coordinator answered."""

    studies: tuple[Progress, ...]
    running: bool = False


SUBMIT = Verb("submit", Submission, Progress)
LIST = Verb("list", Nothing, Table)
STOP = Verb("stop", Named, Progress)
RESUME = Verb("resume", Named, Progress)

FINISHED = ("done", "converged")
"""Reasons of an end after which there is nothing left to go on with."""


class StudyStop(Event):
    """Set by ``stop ID``, and as soon as the whole process is to end."""

    def __init__(self, process: Event) -> None:
        super().__init__()
        self._process = process

    def is_set(self) -> bool:
        """Whether the study is to end."""
        return super().is_set() or self._process.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """As an event's; a process that is to end is noticed within a tenth of a second."""
        left = float("inf") if timeout is None else timeout
        while not self.is_set() and left > 0:
            super().wait(min(left, 0.1))
            left -= 0.1
        return self.is_set()

    @property
    def by_a_person(self) -> bool:
        """Whether this study was stopped, and not the process."""
        return super().is_set()


@dataclass(frozen=True)
class Checks:
    """What a study has to stand before it is kept: the consortium's signature, and that it could run here."""

    verify: Callable[[Signed], bytes]
    fits: Callable[[Study], None]


class Note(Protocol):
    """Writes what a person asks for into the audit log; raises PolicyRefusal where it cannot be written."""

    def __call__(self, event: audit.Event, study: Study, by: str, /) -> None:
        """Return when it is on the disk."""
        ...


class Desk:
    """The functions, around the store and, in the running coordinator, the study that runs.

    Each is in the audit log before it counts, a stop after.
    """

    def __init__(self, store: StudyStore, runs: Path, checks: Checks, *, note: Note, running: bool = False) -> None:
        self.store, self._runs, self._checks, self._is_coordinator = store, runs, checks, running
        self._note = note
        self.live = Live()
        self.news = Event()  # something was submitted or resumed
        self._lock = threading.Lock()
        self._current: tuple[str, StudyStop] | None = None

    def serve(self, admin: AdminSocket) -> None:
        """Answer through ``admin``."""
        admin.serve(SUBMIT, self.submit)
        admin.serve(LIST, self.table)
        admin.serve(STOP, self.stop)
        admin.serve(RESUME, self.resume)

    def submit(self, asked: Submission) -> Progress:
        """Check, keep, and let it have its turn. The same study again changes nothing.

        Raises:
            PolicyRefusal, ProtocolError, ConfigError: it is not signed by this consortium, or could never run here.
        """
        signed = Signed.parse(asked.signed.encode())
        self._checks.verify(signed)
        study = study_in(signed)
        self._checks.fits(study)
        with self._lock:
            if self.store.find(study.digest) is None:
                self._note(audit.Event.SUBMITTED, study, asked.by)
            entry = self.store.add(signed)
        self.news.set()
        return self._progress(entry)

    def table(self, asked: Nothing) -> Table:
        """How far every study is."""
        return Table(
            studies=tuple(self._progress(entry) for entry in self.store.entries()), running=self._is_coordinator
        )

    def stop(self, asked: Named) -> Progress:
        """End a study: one that waits at once, one that runs after the message in flight. Its checkpoint is kept.

        Raises:
            ConfigError: it has ended already.
        """
        with self._lock:
            entry = self.store.entry(asked.digest)
            if entry.record.state in (State.ENDED, State.STOPPED):
                raise ConfigError(f"study {entry.study.name} has {entry.record.state.value} already: see its status")
            if self._current is not None and self._current[0] == entry.digest:
                self._current[1].set()
            else:
                done = self._progress(entry).round
                entry = self.store.mark(entry.digest, State.STOPPED, "stopped", round_number=done)
            self._note(audit.Event.TOLD_TO_STOP, entry.study, asked.by)
            return self._progress(entry)

    def resume(self, asked: Named) -> Progress:
        """Let a study that was stopped, or ended before its end, go on from its checkpoint when its turn comes.

        Raises:
            ConfigError: it is done, waits or runs already, or is just being stopped.
        """
        with self._lock:
            entry = self.store.entry(asked.digest)
            name, record = entry.study.name, entry.record
            if self._current is not None and self._current[0] == entry.digest and self._current[1].by_a_person:
                raise ConfigError(f"study {name} is just being stopped: wait until it has, then resume it")
            if record.state in (State.WAITING, State.RUNNING):
                raise ConfigError(f"study {name} is {record.state.value} already")
            if record.state is State.ENDED and record.reason in FINISHED:
                raise ConfigError(f"study {name} is finished ({record.reason}): there is nothing to go on with")
            self._note(audit.Event.RESUMED, entry.study, asked.by)
            entry = self.store.mark(entry.digest, State.WAITING, round_number=record.round)
        self.news.set()
        return self._progress(entry)

    @contextmanager
    def turn_of(self, entry: Entry, process: Event) -> Iterator[StudyStop]:
        """The study of ``entry`` runs inside the block; what is yielded says when it is to end."""
        stop = StudyStop(process)
        with self._lock:
            self.store.mark(entry.digest, State.RUNNING, round_number=entry.record.round)
            self._current = (entry.digest, stop)
        try:
            yield stop
        finally:
            with self._lock:
                self._current = None

    def next(self) -> Entry | None:
        """The study whose turn it is."""
        self.news.clear()
        with self._lock:
            return self.store.next()

    def _progress(self, entry: Entry) -> Progress:
        current = self._current
        live = self.live if current is not None and current[0] == entry.digest else None
        return progress_of(entry, self._runs, live)


def put(state: Path, verb: Verb[Q, A], question: Q, offline: Callable[[Q], A]) -> A:
    """Ask the running coordinator, or do it ``offline`` where none runs."""
    try:
        return ask(state, verb, question)
    except NotRunning:
        return offline(question)
