"""What a site answers: typed dataclasses <-> Flower records, both halves side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import MetricRecord, RecordDict

from medfl.shared.chain import Head
from medfl.shared.errors import Code, ProtocolError
from medfl.shared.fields import (
    HEADS,
    Log,
    array,
    arrays,
    count_of,
    heads_fields,
    heads_of,
    outcome,
    pack,
    read_reply,
    reply_record,
    sha256_of,
    tally_of,
    unpack,
    value_of,
)
from medfl.shared.flower_records import record_of
from medfl.shared.metrics import Tally
from medfl.shared.secagg.exchange import PhaseReply
from medfl.shared.weights import Flat

UNKNOWN_STUDY = "unknown study"
"""Reason of the failure after which the coordinator offers its study again."""

NO_INITIAL_WEIGHTS = "initial weights wanted"
"""Reason of the failure after which the coordinator offers its study again, with the weights it begins with."""


@dataclass(frozen=True, slots=True)
class OfferAccepted:
    """Site to coordinator: approved here. ``patients`` is the planned number, or None where the site keeps it."""

    patients: int | None = None

    def record(self) -> RecordDict:
        """As Flower records."""
        return reply_record("accepted", {} if self.patients is None else {"patients": self.patients})

    @classmethod
    def parse(cls, content: RecordDict) -> OfferAccepted:
        """Raises ProtocolError when malformed."""
        config = read_reply(content, "accepted", {"patients"})
        return cls(count_of(config, "patients") if "patients" in config else None)


@dataclass(frozen=True, slots=True)
class HeadsReply:
    """Site to coordinator: the heads of its records now, no spend and no patient.

    ``audit_held``: whether its audit log still holds the head that the request had recorded.
    """

    heads: Mapping[Log, Head] = field(default_factory=dict)
    audit_held: bool = True

    def record(self) -> RecordDict:
        """As Flower records."""
        return reply_record("heads", {"audit-held": int(self.audit_held)} | heads_fields(self.heads))

    @classmethod
    def parse(cls, content: RecordDict) -> HeadsReply:
        """Raises ProtocolError when malformed."""
        if outcome(content) == "ledger":  # of protocol 1
            config = read_reply(content, "ledger", {"study", "rows", "head"})
            return cls({Log.LEDGER: Head(count_of(config, "rows"), sha256_of(config, "head"))})
        config = read_reply(content, "heads", {"audit-held", *HEADS})
        held = count_of(config, "audit-held")
        if held > 1:
            raise ProtocolError("the message field 'audit-held' is neither 0 nor 1")
        return cls(heads_of(config), held == 1)


@dataclass(frozen=True, slots=True)
class SecureReply:
    """Site to coordinator: its part of one phase; masked arrays in the third."""

    reply: PhaseReply

    def record(self) -> RecordDict:
        """As Flower records."""
        content = reply_record("phase", {"control": self.reply.control})
        if self.reply.vector is not None and self.reply.scalars is not None:
            content["masked"] = arrays(vector=self.reply.vector, scalars=self.reply.scalars)
        return content

    @classmethod
    def parse(cls, content: RecordDict) -> SecureReply:
        """Raises ProtocolError when malformed."""
        others = {"masked"} if "masked" in content else set()
        control = value_of(read_reply(content, "phase", {"control"}, others=others), "control", bytes)
        if not others:
            return cls(PhaseReply(control))
        vector = array(content, "masked", "vector", {"vector", "scalars"})
        scalars = array(content, "masked", "scalars", {"vector", "scalars"})
        return cls(PhaseReply(control, vector, scalars))


@dataclass(frozen=True, slots=True)
class TrainReply:
    """Site to coordinator without secure aggregation: the update (local minus global weights) and its weight."""

    update: Flat
    examples: int
    tally: Tally = field(default_factory=dict)

    def record(self) -> RecordDict:
        """As Flower records."""
        tally = record_of(MetricRecord, self.tally)
        return reply_record("trained", {"examples": self.examples}, arrays=pack(self.update), tally=tally)

    @classmethod
    def parse(cls, content: RecordDict) -> TrainReply:
        """Raises ProtocolError when malformed."""
        config = read_reply(content, "trained", {"examples"}, others={"arrays", "tally"})
        return cls(unpack(content, "arrays"), count_of(config, "examples"), tally_of(content))


@dataclass(frozen=True, slots=True)
class Ready:
    """Site to coordinator under secure aggregation: done, the result is held here for the masked sum."""

    def record(self) -> RecordDict:
        """As Flower records."""
        return reply_record("ready", {})

    @classmethod
    def parse(cls, content: RecordDict) -> Ready:
        """Raises ProtocolError when malformed."""
        read_reply(content, "ready", set())
        return cls()


@dataclass(frozen=True, slots=True)
class EvaluateReply:
    """Site to coordinator: sums of scores; empty where the site's policy keeps them."""

    tally: Tally = field(default_factory=dict)

    def record(self) -> RecordDict:
        """As Flower records."""
        return reply_record("evaluated", {}, tally=record_of(MetricRecord, self.tally))

    @classmethod
    def parse(cls, content: RecordDict) -> EvaluateReply:
        """Raises ProtocolError when malformed."""
        read_reply(content, "evaluated", set(), others={"tally"})
        return cls(tally_of(content))


@dataclass(frozen=True, slots=True)
class Failure:
    """Site to coordinator: not done. ``reason`` is a short fixed word group, never an exception's text."""

    code: Code
    reason: str = ""

    def record(self) -> RecordDict:
        """As Flower records."""
        return reply_record("failed", {"code": self.code.value, "reason": self.reason[:80]})

    @classmethod
    def parse(cls, content: RecordDict) -> Failure:
        """Raises ProtocolError when malformed."""
        config = read_reply(content, "failed", {"code", "reason"})
        try:
            code = Code(value_of(config, "code", str))
        except ValueError:
            raise ProtocolError("a failure has an unknown code") from None
        reason = value_of(config, "reason", str)
        if len(reason) > 80 or not reason.isprintable():
            raise ProtocolError("a failure has a malformed reason")
        return cls(code, reason)
