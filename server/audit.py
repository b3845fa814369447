"""The coordinator's audit log: what it sent and received, to and from whom, which heads of sites' logs it has seen.

``audit.jsonl`` in the state folder, a :class:`~medfl.shared.chain.Chain` like that of a site. Rows hold kinds, digests,
sizes and fixed words, and never what a message says. What goes out is on the disk before it leaves. What came in is
on the disk before anything goes out after it, and when :meth:`Audit.flush` has returned: one write for many messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from threading import Lock

from medfl.shared.audit_log import open_audit_log
from medfl.shared.chain import Head, Inspection, Row
from medfl.shared.consortium import Membership
from medfl.shared.errors import PolicyRefusal
from medfl.shared.passage import Answer, Content, Form, Passage


class Event(StrEnum):
    """What a row tells of."""

    STARTED = "started"
    STOPPED = "stopped"  # absent before the next start: the coordinator was killed, or its machine
    JOINED = "site approved"  # it is in a later roster, which a command has signed
    REPLACED = "site's keys replaced"
    REVOKED = "site revoked"
    SUBMITTED = "study submitted"
    TOLD_TO_STOP = "study told to stop"
    RESUMED = "study resumed"
    STUDY = "study begun"  # or gone on with
    ENDED = "study ended"
    OUT = "out"  # is about to leave
    IN = "in"
    HEAD = "head seen"  # of a site's audit log
    NOT_HELD = "head not held"  # a site's audit log does not have a row any more that it had


class Audit:
    """The open log. Every method raises PolicyRefusal, reason ``audit log unwritable``, where the disk refuses.

    Raises on construction:
        ConfigError: another process holds the log. PolicyRefusal: reasons ``audit log damaged``, ``... unwritable``.
    """

    def __init__(self, path: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._waiting: list[dict[str, str | int]] = []
        self._lock = Lock()
        self._roster_noted = 0
        self._chain = open_audit_log(path, clock=clock, look=self._look)

    @property
    def head(self) -> Head:
        """How many rows are durable, and the hash of the last one."""
        return self._chain.head

    def started(self, *, release: str, configuration: str, roster: str = "", epoch: int | None = None) -> None:
        """The coordinator begins: its release, SHA-256 of its settings, the roster of secure sums, if any."""
        self._now(Event.STARTED, release=release, configuration=configuration, roster=roster, epoch=epoch)

    def stopped(self) -> None:
        """The coordinator ends as it should."""
        self._now(Event.STOPPED)

    def commanded(self, event: Event, study: str, name: str, *, by: str) -> None:
        """A person has had a study submitted, stopped or resumed; ``by``: the account on this machine.

        What the disk refuses is not done, but for a stop, which comes first: its row waits until there is space.
        """
        if event is not Event.TOLD_TO_STOP:
            self._now(event, study=study, name=name, by=by)
            return
        with self._lock:
            self._add(event, study=study, name=name, by=by)
            self._write()

    def note_rosters(self, newest: int, at: Callable[[int], Membership | None]) -> None:
        """Which sites came, went or changed keys in rosters that the log does not tell of, up to epoch ``newest``."""
        before = at(self._roster_noted)
        known = {} if before is None else before.by_name
        with self._all_or_none():
            for epoch in range(self._roster_noted + 1, newest + 1):
                if (roster := at(epoch)) is None:
                    continue
                for name in sorted(known.keys() - roster.by_name.keys()):
                    self._add(Event.REVOKED, site=name, key=known[name].fingerprint, epoch=epoch)
                for name, site in sorted(roster.by_name.items()):
                    if known.get(name) != site:
                        event = Event.REPLACED if name in known else Event.JOINED
                        self._add(event, site=name, key=site.fingerprint, epoch=epoch)
                known = roster.by_name
        self._roster_noted = newest

    def _look(self, row: Row) -> None:
        if row["event"] in (Event.JOINED, Event.REPLACED, Event.REVOKED):
            self._roster_noted = max(self._roster_noted, int(row["epoch"]))

    def study_begun(self, study: str, name: str) -> None:
        """A study begins, or goes on after a restart."""
        self._now(Event.STUDY, study=study, name=name)

    def study_ended(self, study: str, ending: str, round_number: int) -> None:
        """It has ended after so many rounds."""
        self._now(Event.ENDED, study=study, reason=ending, round=round_number)

    def leaves(self, messages: list[tuple[str, Passage, Content]]) -> None:
        """These are about to go to these sites."""
        with self._all_or_none():
            for site, passage, content in messages:
                self._add(Event.OUT, site=site, bytes=content.bytes, sha256=content.sha256, **passage.fields())

    def received(self, site: str, passage: Passage, answer: Answer, form: Form, content: Content | None) -> None:
        """``site`` has answered what ``passage`` is about. Durable after :meth:`flush`, or with the next other row."""
        with self._lock:
            self._add(
                Event.IN,
                site=site,
                outcome=answer.outcome,
                code=answer.code,
                reason=answer.reason,
                form=form.value,
                bytes=None if content is None else content.bytes,
                sha256="" if content is None else content.sha256,
                **passage.fields(),
            )

    def head_seen(self, site: str, head: Head, *, study: str, round_number: int, signed: bool) -> None:
        """A site has told the head of its audit log; ``signed``: it will get a receipt."""
        with self._lock:
            self._add(Event.HEAD, site=site, rows=head.rows, head=head.digest, study=study, round=round_number,
                      receipt="signed" if signed else "none")  # fmt: skip

    def head_not_held(self, site: str, head: Head) -> None:
        """A site's audit log was cut or begun anew: it does not hold ``head``, which was seen of it."""
        self._now(Event.NOT_HELD, site=site, rows=head.rows, head=head.digest)

    def flush(self) -> None:
        """Make everything durable."""
        with self._lock:
            self._write()

    def close(self) -> None:
        """Let other processes write."""
        self._chain.close()

    def _now(self, event: Event, **fields: str | int | None) -> None:
        with self._all_or_none():
            self._add(event, **fields)

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """What is added inside is durable afterwards, or was never added: it was refused, or is tried again.

        Rows that have waited since before stay in any case: what they tell of has happened.
        """
        with self._lock:
            waited = len(self._waiting)
            try:
                yield
                self._write()
            except BaseException:
                del self._waiting[waited:]
                raise

    def _add(self, event: Event, **fields: str | int | None) -> None:
        known = {key: value for key, value in fields.items() if value is not None and value != ""}
        self._waiting.append({"event": event.value, **known})

    def _write(self) -> None:
        self._chain.append_all(self._waiting)
        self._waiting = []


COLUMNS = (
    *("row", "time", "event", "site", "study", "name", "kind", "phase", "round", "bytes", "sha256", "form"),
    *("outcome", "code", "reason", "rows", "head", "receipt", "by", "key"),
    *("release", "configuration", "roster", "epoch", "hash"),
)


def seen_head(found: Inspection, *, site: str, digest: str) -> str:
    """When the coordinator saw that the last row of ``site``'s audit log had the hash ``digest``, as one line.

    Raises:
        PolicyRefusal: it never did: that log was written anew since, or never had such a row at the end.
    """
    for row in found.rows:
        if row["event"] == Event.HEAD and row["site"] == site and row["head"] == digest:
            return f"{site}'s log had {row['rows']} rows with that hash at {row['time']} (round {row['round']})"
    raise PolicyRefusal(
        f"no head of {site}'s log that was seen here has the hash {digest}: compare with the heads in audit report",
        reason="head not seen",
    )
