"""The site's audit log: what came in and what left, each row durable before the message it tells of may leave.

``audit.jsonl`` in the state folder, a :class:`~medfl.shared.chain.Chain`. Rows hold kinds, digests, sizes, fixed words
and epsilons, and who of the staff decided on a study: never what a message says, no patient, no path, no number of
patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from threading import Lock

from medfl.shared.audit_log import open_audit_log
from medfl.shared.chain import Head, Row
from medfl.shared.passage import Answer, Content, Form, Passage


class Event(StrEnum):
    """What a row tells of."""

    STARTED = "started"
    STOPPED = "stopped"  # absent before the next start: the node was killed, or its machine
    ROSTER = "roster confirmed"
    NOT_HELD = "head not held"  # the coordinator has seen a row that this log does not have: it was cut or begun anew
    APPROVED = "study approved"
    WITHDRAWN = "study withdrawn"
    IN = "in"
    OUT = "out"  # is about to leave: the line may still break, or the coordinator's deadline pass


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
        self.journal: dict[str, Head] = {}
        """By study: how far the journal of secure sums was when an answer left. An older journal answers twice."""
        self._chain = open_audit_log(path, clock=clock, look=self._look)

    @property
    def head(self) -> Head:
        """How many rows there are, and the hash of the last one."""
        return self._chain.head

    def holds(self, head: Head) -> bool:
        """Whether this log has the row that ``head`` names, as it was written."""
        return self._chain.holds(head)

    def not_held(self, head: Head) -> None:
        """The coordinator has seen ``head``, and this log does not hold it."""
        self._write(Event.NOT_HELD, rows=head.rows, head=head.digest)

    def started(self, *, release: str, configuration: str, roster: str = "", epoch: int | None = None) -> None:
        """The node begins: its release, SHA-256 of its site file, and of the roster that is in force, if any."""
        self._write(Event.STARTED, release=release, configuration=configuration, roster=roster, epoch=epoch)

    def stopped(self) -> None:
        """The node ends as it should."""
        self._write(Event.STOPPED)

    def roster_confirmed(self, *, roster: str, epoch: int, members: int) -> None:
        """A person has compared the keys of the roster with this digest."""
        self._write(Event.ROSTER, roster=roster, epoch=epoch, members=members)

    def decided(self, study: str, *, approved: bool, by: str, ethics: str = "") -> None:
        """``by`` of this site's staff has approved, or withdrawn, the study with this digest."""
        self._write(Event.APPROVED if approved else Event.WITHDRAWN, study=study, by=by, ethics=ethics)

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
        journal: Head | None = None,
    ) -> None:
        """A message is about to leave.

        ``content`` is None for the node's own one-word errors. ``journal`` says how far the journal of secure sums is,
        in an answer to a phase of one.
        """
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
            journal=None if journal is None else journal.digest,
            journal_rows=None if journal is None else journal.rows,
        )

    def close(self) -> None:
        """Let other processes write. Everything is durable already."""
        self._chain.close()

    def _look(self, row: Row) -> None:
        if "journal" in row:
            self.journal[str(row["study"])] = Head(int(row["journal_rows"]), str(row["journal"]))

    def _passage(self, event: Event, passage: Passage, **more: str | float | None) -> None:
        self._write(event, **passage.fields(), **more)

    def _write(self, event: Event, **fields: str | float | None) -> None:
        known = {key: value for key, value in fields.items() if value is not None and value != ""}
        row = {"event": event.value, **known}
        with self._lock:  # heartbeats and administrators' commands write from threads of their own
            self._chain.append(row)
            self._on_row(row)
