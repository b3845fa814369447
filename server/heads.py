"""The coordinator's memory of how long each site's records were, so that one that was cut or restored shows.

Of a site's audit log it signs what it has seen; the site gets that receipt with the next question, and keeps it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import Message

from medfl.server.audit import Audit
from medfl.server.stage import Stages
from medfl.shared.chain import Head
from medfl.shared.errors import Code, DataError
from medfl.shared.files import write_whole
from medfl.shared.messages import HeadsReply, HeadsRequest, Kind, Log
from medfl.shared.receipt import Receipt

log = logging.getLogger("medfl.server")

_AGREED = "agreed"
_RESTORED = "restored"  # so end the reasons of a site whose ledger or journal is older than was seen
_DEADLINE_S = 60.0


@dataclass(frozen=True)
class HeadKeeping:
    """Where heads are kept, over all studies, and who signs receipts (None: nobody can, and sites get none)."""

    consortium: str
    path: Path
    audit: Audit
    countersign: Callable[[Receipt], bytes] | None = None


@dataclass
class _Seen:
    """Of one site: its heads (the journal's for each study), and where the audit log's was seen."""

    heads: dict[str, Head] = field(default_factory=dict)
    round: int = 0
    study: str = ""
    time: str = ""


class Heads:
    """Before a round, every site compares its records with what was seen of them, and tells how long they are now."""

    def __init__(self, study: str, stages: Stages, keeping: HeadKeeping | None) -> None:
        """``keeping`` None: the heads are remembered in this process.

        Raises:
            DataError: what is kept is damaged; without it a site could spend twice unseen.
        """
        self._study, self._stages, self._keeping = study, stages, keeping
        self._seen: dict[str, _Seen] = {}
        if keeping is not None and keeping.path.exists():
            try:
                content = json.loads(keeping.path.read_bytes())
                self._seen = {site: _seen(entry) for site, entry in content.items()}
            except (ValueError, TypeError, AttributeError, KeyError):
                raise DataError(
                    f"{keeping.path} cannot be read: restore it from the latest backup; an older one is safe"
                ) from None

    def agree(
        self, number: int, cohort: Mapping[int, str], *, quorum: int = 0
    ) -> tuple[dict[int, str], dict[str, str]]:
        """The sites whose records are as they were seen, and a word about every other. Heads are durable on return.

        A site with older records is waited for, and voids no study: its newest copy may be on its way.
        Sites that were cut off are waited for while fewer than ``quorum`` have answered.
        """
        messages = [
            Message(
                HeadsRequest(self._study, number, self._recorded(site), self._receipt(site)).record(),
                dst_node_id=node,
                message_type=Kind.HEADS.value,
                ttl=_DEADLINE_S,
            )
            for node, site in cohort.items()
        ]

        def take(site: str, reply: Message) -> str:
            self._take(site, HeadsReply.parse(reply.content), number)
            return _AGREED

        outcomes: dict[str, str] = {}
        self._stages.run(number, "records", messages, cohort, outcomes, take=take, quorum=quorum)
        if self._keeping is not None:
            write_whole(self._keeping.path, json.dumps({site: _entry(s) for site, s in self._seen.items()}).encode())
        agreed = {node: site for node, site in cohort.items() if outcomes.get(site) == _AGREED}
        return agreed, {site: _word(why) for site, why in outcomes.items() if why != _AGREED}

    def _name_of(self, kind: Log) -> str:
        return f"{kind.value} {self._study}" if kind is Log.JOURNAL else kind.value

    def _recorded(self, site: str) -> dict[Log, Head]:
        known = self._seen[site].heads if site in self._seen else {}
        return {kind: known[name] for kind in Log if (name := self._name_of(kind)) in known}

    def _receipt(self, site: str) -> bytes:
        seen, keeping = self._seen.get(site), self._keeping
        if seen is None or keeping is None or keeping.countersign is None or Log.AUDIT.value not in seen.heads:
            return b""
        head = seen.heads[Log.AUDIT.value]
        receipt = Receipt(keeping.consortium, site, head.rows, head.digest, seen.study, seen.round, seen.time)
        return keeping.countersign(receipt)

    def _take(self, site: str, reply: HeadsReply, number: int) -> None:
        seen = self._seen.setdefault(site, _Seen())
        before = seen.heads.get(Log.AUDIT.value)
        if before is not None and not reply.audit_held:
            log.warning(
                "%s: its audit log does not hold row %d any more, which was seen in it: it was cut, restored, or begun "
                "anew; ask that hospital",
                site,
                before.rows,
            )
            if self._keeping is not None:
                self._keeping.audit.head_not_held(site, before)
        seen.heads |= {self._name_of(kind): head for kind, head in reply.heads.items()}
        if (head := reply.heads.get(Log.AUDIT)) is None:
            return
        seen.round, seen.study = number, self._study
        seen.time = datetime.now(UTC).isoformat(timespec="seconds")
        if self._keeping is not None:
            signed = self._keeping.countersign is not None
            self._keeping.audit.head_seen(site, head, study=self._study, round_number=number, signed=signed)


def _word(why: str) -> str:
    code, _, reason = why.partition(": ")
    return f"waits: {reason}" if code == Code.REFUSED and reason.endswith(_RESTORED) else why


def _entry(seen: _Seen) -> dict[str, object]:
    heads = {name: [head.rows, head.digest] for name, head in seen.heads.items()}
    return {"heads": heads, "round": seen.round, "study": seen.study, "time": seen.time}


def _seen(entry: dict[str, object]) -> _Seen:
    heads = entry["heads"]
    if not isinstance(heads, dict):
        raise TypeError
    known = {str(name): Head(int(rows), str(digest)) for name, (rows, digest) in heads.items()}
    return _Seen(known, int(str(entry["round"])), str(entry["study"]), str(entry["time"]))
