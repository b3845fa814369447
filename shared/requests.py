"""What the coordinator asks of a site: typed dataclasses <-> Flower records, both halves side by side.

Requests use Flower's own record names (``arrays``, ``config``), so that any ``flwr.serverapp.strategy.Strategy`` can
write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from medfl.shared.chain import Head
from medfl.shared.errors import ProtocolError
from medfl.shared.fields import (
    HEADS,
    PROTOCOL,
    Log,
    array,
    arrays,
    check_protocol,
    config_record,
    count_of,
    digest_of_study,
    heads_fields,
    heads_of,
    pack,
    read_config,
    unpack,
    value_of,
)
from medfl.shared.secagg.exchange import Phase
from medfl.shared.weights import Flat

_FILE = "file"
_COUNTED = "counted"
_SIGNATURE = "signature"

_NEW = frozenset({_COUNTED, _SIGNATURE})
"""Fields of requests that the protocol before does not have; a site that speaks it does without."""

_MODEL_FIELDS = frozenset({"study", "server-round", "protocol", "proximal-mu", "encoding", _COUNTED})

_SIGNATURE_BYTES = 64  # Ed25519
_LARGEST_RECEIPT = 4096  # bytes


class Kind(StrEnum):
    """Message types, in Flower's grammar ``train|evaluate|query[.name]``."""

    OFFER = "query.offer"
    TRAIN = "train"
    EVALUATE = "evaluate"
    WEIGHT = "query.weight"
    PHASE = "query.phase"
    HEADS = "query.ledger"  # in protocol 1 it asked for the ledger alone


@dataclass(frozen=True, slots=True)
class StudyOffer:
    """Coordinator to site: here is a study, say whether you take part."""

    digest: str
    canonical: bytes
    signature: bytes  # the consortium's, of the canonical form as a study (medfl.shared.signing)
    initial: bytes = b""  # the file of initial weights, for a site that has asked for it

    def record(self) -> RecordDict:
        """As Flower records."""
        content = config_record(
            {
                "study": self.digest,
                "canonical": self.canonical,
                "protocol": PROTOCOL,
                _SIGNATURE: self.signature,
            }
        )
        if self.initial:
            content["initial"] = arrays(**{_FILE: np.frombuffer(self.initial, dtype=np.uint8)})
        return content

    @classmethod
    def parse(cls, content: RecordDict) -> StudyOffer:
        """Raises ProtocolError when malformed."""
        others = {"initial"} if "initial" in content else set()
        config = read_config(content, {"study", "canonical", _SIGNATURE, "protocol"}, others=others)
        check_protocol(config)
        signature = config.get(_SIGNATURE)
        if not isinstance(signature, bytes) or len(signature) != _SIGNATURE_BYTES:
            raise ProtocolError("the offer has no signature: the coordinator must submit the study with medfl-server")
        initial = b""
        if others:
            file = array(content, "initial", _FILE, {_FILE})
            if file.dtype != np.uint8:
                raise ProtocolError("the initial weights are not the bytes of a file")
            initial = file.tobytes()
        return cls(digest_of_study(config), value_of(config, "canonical", bytes), signature, initial)


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
        config = read_config(content, _MODEL_FIELDS, others={"arrays"})
        check_protocol(config)
        round_number = value_of(config, "server-round", int)
        if not 1 <= round_number < 2**32:
            raise ProtocolError(f"round {round_number} is not a round number")
        encoding = value_of(config, "encoding", bytes) if "encoding" in config else b""
        counted = value_of(config, _COUNTED, int) if _COUNTED in config else None
        return cls(digest_of_study(config), round_number, unpack(content, "arrays"), encoding, counted)


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """Coordinator to site: hold your weight ready for a secure sum of all weights."""

    study: str  # digest
    encoding: bytes

    def record(self) -> RecordDict:
        """As Flower records."""
        return config_record({"study": self.study, "encoding": self.encoding, "protocol": PROTOCOL})

    @classmethod
    def parse(cls, content: RecordDict) -> WeightRequest:
        """Raises ProtocolError when malformed."""
        config = read_config(content, {"study", "encoding", "protocol"}, others=set())
        check_protocol(config)
        return cls(digest_of_study(config), value_of(config, "encoding", bytes))


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
        heads = heads_fields(self.recorded)
        return config_record({"study": self.study, "server-round": self.round, "receipt": self.receipt,
                        "protocol": PROTOCOL, **heads})  # fmt: skip

    @classmethod
    def parse(cls, content: RecordDict) -> HeadsRequest:
        """Raises ProtocolError when malformed."""
        config = read_config(content, {"study", "server-round", "receipt", "protocol", *HEADS}, others=set())
        check_protocol(config)
        receipt = value_of(config, "receipt", bytes)
        if len(receipt) > _LARGEST_RECEIPT:
            raise ProtocolError("a receipt is too long")
        return cls(digest_of_study(config), count_of(config, "server-round"), heads_of(config), receipt)


@dataclass(frozen=True, slots=True)
class SecureRequest:
    """Coordinator to site: one phase of a secure sum. What ``control`` holds is MSA-1's own business."""

    phase: Phase
    control: bytes

    def record(self) -> RecordDict:
        """As Flower records."""
        return config_record({"phase": self.phase.value, "control": self.control, "protocol": PROTOCOL})

    @classmethod
    def parse(cls, content: RecordDict) -> SecureRequest:
        """Raises ProtocolError when malformed."""
        config = read_config(content, {"phase", "control", "protocol"}, others=set())
        check_protocol(config)
        try:
            phase = Phase(value_of(config, "phase", str))
        except ValueError:
            raise ProtocolError("the message names an unknown phase") from None
        return cls(phase, value_of(config, "control", bytes))


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


def _ledger_question(config: ConfigRecord, version: int) -> RecordDict:
    """A :class:`HeadsRequest` in protocol 1."""
    rows, head = config.get("ledger-rows", 0), config.get("ledger-head", "")
    return RecordDict({
        "config": ConfigRecord({"study": config["study"], "rows": rows, "head": head, "protocol": version})
    })  # fmt: skip
