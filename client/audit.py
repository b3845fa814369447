"""The site's audit log: what came in and what left, each row durable before the message it tells of may leave.

``audit.jsonl`` in the state folder, a :class:`~medfl.shared.chain.Chain`. Rows hold kinds, digests, sizes, fixed words
and epsilons: never what a message says, no name, no path, no number of patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from threading import Lock

from medfl.shared.chain import Chain, Head, Role
from medfl.shared.errors import ConfigError, PolicyRefusal

AUDIT = Role(
    "audit log",
    "Nothing runs until both its files are moved to a safe place (keep them, they are evidence): a new log begins then",
)


def audit_file(state: Path) -> Path:
    """Where the audit log of a state folder is."""
    return state / "audit.jsonl"


class Event(StrEnum):
    """What a row tells of."""

    STARTED = "started"
    STOPPED = "stopped"  # absent before the next start: the node was killed, or its machine
    ROSTER = "roster confirmed"
    IN = "in"
    OUT = "out"  # is about to leave: the line may still break, or the coordinator's deadline pass


class Form(StrEnum):
    """How results stand in a message that leaves."""

    MASKED = "masked"  # only the sum over all sites becomes known
    CLEAR = "clear"
    NOTHING = "no result"  # keys, shares, acknowledgements, refusals


@dataclass(frozen=True, slots=True)
class Content:
    """Size and digest of what a message holds, without headers of the transport."""

    bytes: int
    sha256: str  # Flower's object id: the very name under which the content crosses and the coordinator keeps it


@dataclass(frozen=True, slots=True)
class Passage:
    """What a message is about."""

    kind: str  # of medfl.shared.messages.Kind, or "unknown"
    study: str = ""  # digest; empty where the message belongs to none that is known here
    round: int | None = None
    phase: str = ""  # of a secure sum
    name: str = ""  # the study's, in an offer


@dataclass(frozen=True, slots=True)
class Answer:
    """What the site says: an outcome of medfl.shared.messages, or ``failed`` with code and fixed words."""

    outcome: str
    code: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Price:
    """What patients have spent when a message of a differentially private study leaves."""

    epsilon: float  # of this study
    epsilon_total: float


class Audit:
    """The open log. One process at a time; a full or broken disk refuses, so that nothing leaves unseen.

    Every method raises:
        PolicyRefusal: reason ``audit log unwritable``; what was to be written must then not happen.

    Raises on construction:
        ConfigError: another process holds the log, that is, this site's node runs.
        PolicyRefusal: reasons ``audit log damaged``, ``audit log unwritable``.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        on_row: Callable[[Mapping[str, str | float]], None] = lambda row: None,
    ) -> None:
        """``on_row`` is told each row when it is durable."""
        self._on_row = on_row
        self._lock = Lock()
        try:
            self._chain = Chain(path, AUDIT, clock=clock, keep_rows=False)
        except PolicyRefusal as refusal:
            if refusal.reason == f"{AUDIT.name} busy":
                raise ConfigError(str(refusal)) from None
            raise

    @property
    def head(self) -> Head:
        """How many rows there are, and the hash of the last one."""
        return self._chain.head

    def started(self, *, release: str, configuration: str, roster: str = "", epoch: int | None = None) -> None:
        """The node begins: its release, SHA-256 of its site file, and of the roster that is in force, if any."""
        self._write(Event.STARTED, release=release, configuration=configuration, roster=roster, epoch=epoch)

    def stopped(self) -> None:
        """The node ends as it should."""
        self._write(Event.STOPPED)

    def roster_confirmed(self, *, roster: str, epoch: int, members: int) -> None:
        """A person has compared the keys of the roster with this digest."""
        self._write(Event.ROSTER, roster=roster, epoch=epoch, members=members)

    def received(self, passage: Passage, content: Content) -> None:
        """A message came in; nothing was done with it yet."""
        self._passage(Event.IN, passage, bytes=content.bytes, sha256=content.sha256)

    def leaves(
        self,
        passage: Passage,
        answer: Answer,
        *,
        form: Form,
        content: Content | None = None,
        price: Price | None = None,
    ) -> None:
        """A message is about to leave. ``content`` is None for the node's own one-word errors."""
        self._passage(
            Event.OUT,
            passage,
            outcome=answer.outcome,
            code=answer.code,
            reason=answer.reason,
            form=form.value,
            bytes=None if content is None else content.bytes,
            sha256="" if content is None else content.sha256,
            epsilon=None if price is None else price.epsilon,
            epsilon_total=None if price is None else price.epsilon_total,
        )

    def close(self) -> None:
        """Let other processes write. Everything is durable already."""
        self._chain.close()

    def _passage(self, event: Event, passage: Passage, **more: str | float | None) -> None:
        self._write(
            event,
            kind=passage.kind,
            study=passage.study,
            round=passage.round,
            phase=passage.phase,
            name=passage.name,
            **more,
        )

    def _write(self, event: Event, **fields: str | float | None) -> None:
        known = {key: value for key, value in fields.items() if value is not None and value != ""}
        row = {"event": event.value, **known}
        with self._lock:  # heartbeats and administrators' commands write from threads of their own
            self._chain.append(row)
            self._on_row(row)
