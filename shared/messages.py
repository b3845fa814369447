"""Everything that crosses between coordinator and site: typed dataclasses <-> Flower records, both halves side by side.

Requests use Flower's own record names (``arrays``, ``config``), so that any ``flwr.serverapp.strategy.Strategy`` can
write them. Replies carry a nonce, because Flower addresses stored objects by their content: two sites' identical
replies would otherwise be one object. Whatever does not parse is a ProtocolError, never a KeyError.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import isfinite
from typing import Any, TypeVar

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from medfl.shared.arrays import as_array, as_numpy
from medfl.shared.chain import Head
from medfl.shared.errors import Code, ProtocolError
from medfl.shared.metrics import Tally
from medfl.shared.secagg.exchange import Phase, PhaseReply
from medfl.shared.weights import Flat

PROTOCOL = 2
"""Version of these messages. A coordinator serves sites of its own version and of the one before."""

TENSOR = "float32"
"""Key of the one flat tensor inside an ArrayRecord."""

UNKNOWN_STUDY = "unknown study"
"""Reason of the failure after which the coordinator offers its study again."""

NO_INITIAL_WEIGHTS = "initial weights wanted"
"""Reason of the failure after which the coordinator offers its study again, with the weights it begins with."""

_FILE = "file"
_COUNTED = "counted"

_SIGNATURE = "signature"

_NEW = frozenset({_COUNTED, _SIGNATURE})
"""Fields of requests that the protocol before does not have; a site that speaks it does without."""

_LONGEST_NAME = 200  # of a tally's entry: "confusion/", and two names of classes of at most 64 letters

_SIGNATURE_BYTES = 64  # Ed25519

_HEXADECIMAL = frozenset("0123456789abcdef")

T = TypeVar("T", str, int, float, bytes, bool)


class Kind(StrEnum):
    """Message types, in Flower's grammar ``train|evaluate|query[.name]``."""

    OFFER = "query.offer"
    TRAIN = "train"
    EVALUATE = "evaluate"
    WEIGHT = "query.weight"
    PHASE = "query.phase"
    HEADS = "query.ledger"  # in protocol 1 it asked for the ledger alone


class Log(StrEnum):
    """A site's records, of which the coordinator remembers the heads, so that an older copy shows."""

    AUDIT = "audit"
    LEDGER = "ledger"
    JOURNAL = "journal"  # of secure sums: a count for each study, and the journal's own number in place of a hash


_HEADS = frozenset(f"{log.value}-{part}" for log in Log for part in ("rows", "head"))
_LARGEST_RECEIPT = 4096  # bytes


@dataclass(frozen=True, slots=True)
class StudyOffer:
    """Coordinator to site: here is a study, say whether you take part."""

    digest: str
    canonical: bytes
    signature: bytes  # the consortium's, of the canonical form as a study (medfl.shared.signing)
    initial: bytes = b""  # the file of initial weights, for a site that has asked for it

    def record(self) -> RecordDict:
        """As Flower records."""
        content = _config(
            {
                "study": self.digest,
                "canonical": self.canonical,
                "protocol": PROTOCOL,
                _SIGNATURE: self.signature,
            }
        )
        if self.initial:
            content["initial"] = _arrays(**{_FILE: np.frombuffer(self.initial, dtype=np.uint8)})
        return content

    @classmethod
    def parse(cls, content: RecordDict) -> StudyOffer:
        """Raises ProtocolError when malformed."""
        others = {"initial"} if "initial" in content else set()
        config = _read_config(content, {"study", "canonical", _SIGNATURE, "protocol"}, others=others)
        _check_protocol(config)
        signature = config.get(_SIGNATURE)
        if not isinstance(signature, bytes) or len(signature) != _SIGNATURE_BYTES:
            raise ProtocolError("the offer has no signature: the coordinator must submit the study with medfl-server")
        initial = b""
        if others:
            file = _array(content, "initial", _FILE, {_FILE})
            if file.dtype != np.uint8:
                raise ProtocolError("the initial weights are not the bytes of a file")
            initial = file.tobytes()
        return cls(_digest(config), _value(config, "canonical", bytes), signature, initial)


@dataclass(frozen=True, slots=True)
class OfferAccepted:
    """Site to coordinator: approved here. ``patients`` is the planned number, or None where the site keeps it."""

    patients: int | None = None

    def record(self) -> RecordDict:
        """As Flower records."""
        return _reply("accepted", {} if self.patients is None else {"patients": self.patients})

    @classmethod
    def parse(cls, content: RecordDict) -> OfferAccepted:
        """Raises ProtocolError when malformed."""
        config = _read_reply(content, "accepted", {"patients"})
        return cls(_count(config, "patients") if "patients" in config else None)


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """Coordinator to site: train from, or evaluate, these weights."""

    study: str  # digest
    round: int  # counted from 1
    weights: Flat
    encoding: bytes = b""  # under secure aggregation: how the result is to be encoded for the sum
    counted: int | None = None  # last round whose model holds this site's answer (0: none); None where it is not told

    def record(self) -> RecordDict:
        """As Flower records."""
        config = request_config(self.study, self.round, encoding=self.encoding)
        if self.counted is not None:
            config[_COUNTED] = self.counted
        return RecordDict({"arrays": pack(self.weights), "config": config})

    @classmethod
    def parse(cls, content: RecordDict) -> ModelRequest:
        """Raises ProtocolError when malformed."""
        fields = {"study", "server-round", "protocol", "proximal-mu", "encoding", _COUNTED}
        config = _read_config(content, fields, others={"arrays"})
        _check_protocol(config)
        round_number = _value(config, "server-round", int)
        if not 1 <= round_number < 2**32:
            raise ProtocolError(f"round {round_number} is not a round number")
        encoding = _value(config, "encoding", bytes) if "encoding" in config else b""
        counted = _value(config, _COUNTED, int) if _COUNTED in config else None
        return cls(_digest(config), round_number, unpack(content, "arrays"), encoding, counted)


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """Coordinator to site: hold your weight ready for a secure sum of all weights."""

    study: str  # digest
    encoding: bytes

    def record(self) -> RecordDict:
        """As Flower records."""
        return _config({"study": self.study, "encoding": self.encoding, "protocol": PROTOCOL})

    @classmethod
    def parse(cls, content: RecordDict) -> WeightRequest:
        """Raises ProtocolError when malformed."""
        config = _read_config(content, {"study", "encoding", "protocol"}, others=set())
        _check_protocol(config)
        return cls(_digest(config), _value(config, "encoding", bytes))


@dataclass(frozen=True, slots=True)
class HeadsRequest:
    """Coordinator to site before a round: how long its records were when last seen, and how long are they now.

    ``recorded`` has the records that the coordinator knows of; ``receipt`` is its signature under the head of the audit
    log, as :class:`medfl.shared.receipt.Receipt`, empty where none was seen yet.
    """

    study: str  # digest
    round: int
    recorded: Mapping[Log, Head] = field(default_factory=dict)
    receipt: bytes = b""

    def record(self) -> RecordDict:
        """As Flower records."""
        heads = _heads_fields(self.recorded)
        return _config({"study": self.study, "server-round": self.round, "receipt": self.receipt,
                        "protocol": PROTOCOL, **heads})  # fmt: skip

    @classmethod
    def parse(cls, content: RecordDict) -> HeadsRequest:
        """Raises ProtocolError when malformed."""
        config = _read_config(content, {"study", "server-round", "receipt", "protocol", *_HEADS}, others=set())
        _check_protocol(config)
        receipt = _value(config, "receipt", bytes)
        if len(receipt) > _LARGEST_RECEIPT:
            raise ProtocolError("a receipt is too long")
        return cls(_digest(config), _count(config, "server-round"), _heads(config), receipt)


@dataclass(frozen=True, slots=True)
class HeadsReply:
    """Site to coordinator: the heads of its records now, no spend and no patient.

    ``audit_held``: whether its audit log still holds the head that the request had recorded.
    """

    heads: Mapping[Log, Head] = field(default_factory=dict)
    audit_held: bool = True

    def record(self) -> RecordDict:
        """As Flower records."""
        return _reply("heads", {"audit-held": int(self.audit_held)} | _heads_fields(self.heads))

    @classmethod
    def parse(cls, content: RecordDict) -> HeadsReply:
        """Raises ProtocolError when malformed."""
        if outcome(content) == "ledger":  # of protocol 1
            config = _read_reply(content, "ledger", {"study", "rows", "head"})
            return cls({Log.LEDGER: Head(_count(config, "rows"), _sha256(config, "head"))})
        config = _read_reply(content, "heads", {"audit-held", *_HEADS})
        held = _count(config, "audit-held")
        if held > 1:
            raise ProtocolError("the message field 'audit-held' is neither 0 nor 1")
        return cls(_heads(config), held == 1)


@dataclass(frozen=True, slots=True)
class SecureRequest:
    """Coordinator to site: one phase of a secure sum. What ``control`` holds is MSA-1's own business."""

    phase: Phase
    control: bytes

    def record(self) -> RecordDict:
        """As Flower records."""
        return _config({"phase": self.phase.value, "control": self.control, "protocol": PROTOCOL})

    @classmethod
    def parse(cls, content: RecordDict) -> SecureRequest:
        """Raises ProtocolError when malformed."""
        config = _read_config(content, {"phase", "control", "protocol"}, others=set())
        _check_protocol(config)
        try:
            phase = Phase(_value(config, "phase", str))
        except ValueError:
            raise ProtocolError("the message names an unknown phase") from None
        return cls(phase, _value(config, "control", bytes))


@dataclass(frozen=True, slots=True)
class SecureReply:
    """Site to coordinator: its part of one phase; masked arrays in the third."""

    reply: PhaseReply

    def record(self) -> RecordDict:
        """As Flower records."""
        content = _reply("phase", {"control": self.reply.control})
        if self.reply.vector is not None and self.reply.scalars is not None:
            content["masked"] = _arrays(vector=self.reply.vector, scalars=self.reply.scalars)
        return content

    @classmethod
    def parse(cls, content: RecordDict) -> SecureReply:
        """Raises ProtocolError when malformed."""
        others = {"masked"} if "masked" in content else set()
        control = _value(_read_reply(content, "phase", {"control"}, others=others), "control", bytes)
        if not others:
            return cls(PhaseReply(control))
        vector = _array(content, "masked", "vector", {"vector", "scalars"})
        scalars = _array(content, "masked", "scalars", {"vector", "scalars"})
        return cls(PhaseReply(control, vector, scalars))


@dataclass(frozen=True, slots=True)
class TrainReply:
    """Site to coordinator without secure aggregation: the update (local minus global weights) and its weight."""

    update: Flat
    examples: int
    tally: Tally = field(default_factory=dict)

    def record(self) -> RecordDict:
        """As Flower records."""
        content = _reply("trained", {"examples": self.examples})
        content["arrays"] = pack(self.update)
        content["tally"] = MetricRecord(dict(self.tally))
        return content

    @classmethod
    def parse(cls, content: RecordDict) -> TrainReply:
        """Raises ProtocolError when malformed."""
        config = _read_reply(content, "trained", {"examples"}, others={"arrays", "tally"})
        return cls(unpack(content, "arrays"), _count(config, "examples"), _tally(content))


@dataclass(frozen=True, slots=True)
class Ready:
    """Site to coordinator under secure aggregation: done, the result is held here for the masked sum."""

    def record(self) -> RecordDict:
        """As Flower records."""
        return _reply("ready", {})

    @classmethod
    def parse(cls, content: RecordDict) -> Ready:
        """Raises ProtocolError when malformed."""
        _read_reply(content, "ready", set())
        return cls()


@dataclass(frozen=True, slots=True)
class EvaluateReply:
    """Site to coordinator: sums of scores; empty where the site's policy keeps them."""

    tally: Tally = field(default_factory=dict)

    def record(self) -> RecordDict:
        """As Flower records."""
        content = _reply("evaluated", {})
        content["tally"] = MetricRecord(dict(self.tally))
        return content

    @classmethod
    def parse(cls, content: RecordDict) -> EvaluateReply:
        """Raises ProtocolError when malformed."""
        _read_reply(content, "evaluated", set(), others={"tally"})
        return cls(_tally(content))


@dataclass(frozen=True, slots=True)
class Failure:
    """Site to coordinator: not done. ``reason`` is a short fixed word group, never an exception's text."""

    code: Code
    reason: str = ""

    def record(self) -> RecordDict:
        """As Flower records."""
        return _reply("failed", {"code": self.code.value, "reason": self.reason[:80]})

    @classmethod
    def parse(cls, content: RecordDict) -> Failure:
        """Raises ProtocolError when malformed."""
        config = _read_reply(content, "failed", {"code", "reason"})
        try:
            code = Code(_value(config, "code", str))
        except ValueError:
            raise ProtocolError("a failure has an unknown code") from None
        reason = _value(config, "reason", str)
        if len(reason) > 80 or not reason.isprintable():
            raise ProtocolError("a failure has a malformed reason")
        return cls(code, reason)


def outcome(content: RecordDict) -> str:
    """What kind of reply this is: accepted, trained, ready, evaluated, phase, failed."""
    return _value(_read_config(content, None), "outcome", str)


def protocol_of(content: RecordDict) -> int | None:
    """The version in which ``content`` says it is written, None where it says none."""
    config = content.get("config")
    version = config.get("protocol") if isinstance(config, ConfigRecord) else None
    return version if isinstance(version, int) and not isinstance(version, bool) else None


def written_as(content: RecordDict, version: int) -> RecordDict:
    """A request of this protocol as a site reads it that speaks ``version``, which is this one or the one before."""
    config = content.get("config")
    if version == PROTOCOL or not isinstance(config, ConfigRecord):
        return content
    if "receipt" in config:
        return _ledger_question(config, version)
    kept = {key: value for key, value in config.items() if key not in _NEW}
    return RecordDict({**content, "config": ConfigRecord({**kept, "protocol": version})})


def request_config(study: str, round_number: int, *, encoding: bytes = b"") -> ConfigRecord:
    """The ``config`` record of a :class:`ModelRequest`; strategies may add what they need (``proximal-mu``)."""
    config = ConfigRecord({"study": study, "server-round": round_number, "protocol": PROTOCOL})
    if encoding:
        config["encoding"] = encoding
    return config


def tell_counted(message: Message, last_round: int) -> None:
    """Tell the site that ``message`` goes to in which round its answer was last counted (0: in none).

    What the site keeps for the coordinator to reckon with must go back to there where an answer came too late.
    """
    config = ConfigRecord({**message.content.config_records["config"], _COUNTED: last_round})
    message.content = RecordDict({**message.content, "config": config})  # strategies give all sites the same record


def pack(vector: Flat) -> ArrayRecord:
    """One flat tensor as an ArrayRecord."""
    return _arrays(**{TENSOR: vector})


def unpack(content: RecordDict, name: str) -> Flat:
    """The flat float32 tensor of the ArrayRecord ``name``. Raises ProtocolError when it is anything else."""
    vector = _array(content, name, TENSOR, {TENSOR})
    if vector.dtype != np.float32:
        raise ProtocolError(f"the tensor in '{name}' must be float32, got {vector.dtype}")
    return vector


def _arrays(**vectors: NDArray[Any]) -> ArrayRecord:
    record = ArrayRecord()
    for name, vector in vectors.items():
        record[name] = as_array(vector)
    return record


def _array(content: RecordDict, name: str, key: str, keys: set[str]) -> NDArray[Any]:
    """A one-dimensional array of the ArrayRecord ``name``, which must hold exactly ``keys``."""
    record = content.get(name)
    if not isinstance(record, ArrayRecord) or set(record) != keys:
        raise ProtocolError(f"the message has no arrays {', '.join(sorted(keys))} in '{name}'")
    try:
        vector = as_numpy(record[key])
    except Exception:  # numpy raises many types on bytes from elsewhere, MemoryError where a header claims too much
        raise ProtocolError(f"the tensor in '{name}' cannot be read") from None
    if not isinstance(vector, np.ndarray):  # bytes of a zip archive, which numpy opens as well
        raise ProtocolError(f"the tensor in '{name}' is an archive")
    if vector.ndim != 1:
        raise ProtocolError(f"the tensor in '{name}' must have one axis, got {vector.ndim}")
    return vector


def _config(values: dict[str, str | int | bytes]) -> RecordDict:
    return RecordDict({"config": ConfigRecord(values)})  # type: ignore[arg-type]


def _reply(kind: str, values: Mapping[str, str | int | bytes]) -> RecordDict:
    return _config({"outcome": kind, "nonce": secrets.token_hex(16), "protocol": PROTOCOL, **values})


def _read_config(content: RecordDict, allowed: set[str] | None, *, others: set[str] | None = None) -> ConfigRecord:
    config = content.get("config")
    if not isinstance(config, ConfigRecord):
        raise ProtocolError("the message has no configuration record")
    if allowed is not None and (unknown := set(config) - allowed):
        raise ProtocolError(f"the message has unknown fields: {', '.join(sorted(unknown))[:200]}")
    if others is not None and set(content) != {"config"} | others:
        raise ProtocolError(f"the message must hold the records {', '.join(['config', *sorted(others)])}")
    return config


def _read_reply(content: RecordDict, kind: str, fields: set[str], *, others: set[str] | None = None) -> ConfigRecord:
    config = _read_config(content, fields | {"outcome", "nonce", "protocol"}, others=others or set())
    _check_protocol(config)
    _value(config, "nonce", str)
    if (got := _value(config, "outcome", str)) != kind:
        raise ProtocolError(f"expected a reply '{kind}', got '{got[:40]}'")
    return config


def _check_protocol(config: ConfigRecord) -> None:
    version = _value(config, "protocol", int)
    if version not in (PROTOCOL, PROTOCOL - 1):
        raise ProtocolError(
            f"the other side speaks protocol {version}, this release {PROTOCOL}: update the older of the two"
        )


def _value(config: ConfigRecord, key: str, kind: type[T]) -> T:
    value = config.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ProtocolError(f"the message field '{key}' is missing or not {kind.__name__}")
    return value


def _digest(config: ConfigRecord) -> str:
    digest = _value(config, "study", str)
    if len(digest) != 64 or set(digest) - _HEXADECIMAL:
        raise ProtocolError("the message names its study by something that is not a digest")
    return digest


def _sha256(config: ConfigRecord, key: str) -> str:
    digest = _value(config, key, str)
    if len(digest) != 64 or set(digest) - _HEXADECIMAL:
        raise ProtocolError(f"the message field '{key}' is not a hash")
    return digest


def _count(config: ConfigRecord, key: str) -> int:
    count = _value(config, key, int)
    if not 0 <= count < 2**32:
        raise ProtocolError(f"the message field '{key}' is not a count")
    return count


def _ledger_question(config: ConfigRecord, version: int) -> RecordDict:
    """A :class:`HeadsRequest` in protocol 1."""
    rows, head = config.get("ledger-rows", 0), config.get("ledger-head", "")
    return RecordDict({
        "config": ConfigRecord({"study": config["study"], "rows": rows, "head": head, "protocol": version})
    })  # fmt: skip


def _heads_fields(heads: Mapping[Log, Head]) -> dict[str, str | int | bytes]:
    fields: dict[str, str | int | bytes] = {}
    for log, head in heads.items():
        fields |= {f"{log.value}-rows": head.rows, f"{log.value}-head": head.digest}
    return fields


def _heads(config: ConfigRecord) -> dict[Log, Head]:
    heads: dict[Log, Head] = {}
    for log in Log:
        rows, head = f"{log.value}-rows", f"{log.value}-head"
        if rows not in config and head not in config:
            continue
        heads[log] = Head(_count(config, rows), _sha256(config, head))
    return heads


def _tally(content: RecordDict) -> dict[str, float]:
    record = content.get("tally")
    if not isinstance(record, MetricRecord):
        raise ProtocolError("the message has no tally")
    tally: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list) or not isfinite(value) or not key.isprintable() or len(key) > _LONGEST_NAME:
            raise ProtocolError("a tally must hold finite numbers under short names")
        tally[key] = float(value)
    return tally
