"""Flower records written and read field by field: whatever is not as it should be is a ProtocolError, never a KeyError.

Replies carry a nonce, because Flower addresses stored objects by their content: two sites' identical replies would
otherwise be one object.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Set
from enum import StrEnum
from math import isfinite
from typing import Any, TypeVar

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from medfl.shared.arrays import as_array, as_numpy
from medfl.shared.chain import Head
from medfl.shared.errors import ProtocolError
from medfl.shared.flower_records import record_of
from medfl.shared.weights import Flat

PROTOCOL = 2
"""Version of these messages. A coordinator serves sites of its own version and of the one before."""

TENSOR = "float32"
"""Key of the one flat tensor inside an ArrayRecord."""

_LONGEST_NAME = 200  # of a tally's entry: "confusion/", and two names of classes of at most 64 letters

_HEXADECIMAL = frozenset("0123456789abcdef")

Fields = Mapping[str, object]
"""The record ``config`` of a message, read out once: what Flower's own classes check at each look costs more."""

T = TypeVar("T", str, int, float, bytes, bool)


class Log(StrEnum):
    """A site's records, of which the coordinator remembers the heads, so that an older copy shows."""

    AUDIT = "audit"
    LEDGER = "ledger"
    JOURNAL = "journal"  # of secure sums: a count for each study, and the journal's own number in place of a hash


HEADS = frozenset(f"{log.value}-{part}" for log in Log for part in ("rows", "head"))
"""Names of the fields that :func:`heads_fields` writes."""


def pack(vector: Flat) -> ArrayRecord:
    """One flat tensor as an ArrayRecord."""
    return arrays(**{TENSOR: vector})


def unpack(content: RecordDict, name: str) -> Flat:
    """The flat float32 tensor of the ArrayRecord ``name``. Raises ProtocolError when it is anything else."""
    vector = array(content, name, TENSOR, {TENSOR})
    if vector.dtype != np.float32:
        raise ProtocolError(f"the tensor in '{name}' must be float32, got {vector.dtype}")
    return vector


def arrays(**vectors: NDArray[Any]) -> ArrayRecord:
    """One flat tensor under each name, as an ArrayRecord."""
    return record_of(ArrayRecord, {name: as_array(vector) for name, vector in vectors.items()})


def array(content: RecordDict, name: str, key: str, keys: set[str]) -> NDArray[Any]:
    """A one-dimensional array of the ArrayRecord ``name``, which must hold exactly ``keys``."""
    record = content.get(name)
    if not isinstance(record, ArrayRecord) or record.keys() != keys:
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


def config_record(values: dict[str, str | int | bytes]) -> RecordDict:
    """Only a record ``config``."""
    return record_of(RecordDict, {"config": record_of(ConfigRecord, values)})


def reply_record(
    kind: str, values: Mapping[str, str | int | bytes], **others: ArrayRecord | MetricRecord
) -> RecordDict:
    """The records of a reply of ``kind``, with its nonce, and ``others`` beside them."""
    said = {"outcome": kind, "protocol": PROTOCOL, "nonce": secrets.token_hex(16), **values}
    return record_of(RecordDict, {"config": record_of(ConfigRecord, said), **others})


def read_config(content: RecordDict, allowed: Set[str] | None, *, others: Set[str] | None = None) -> Fields:
    """The record ``config`` with no fields but ``allowed``, beside no records but ``others``. Raises ProtocolError."""
    config = content.get("config")
    if not isinstance(config, ConfigRecord):
        raise ProtocolError("the message has no configuration record")
    fields = dict(config.items())
    if allowed is not None and (unknown := fields.keys() - allowed):
        raise ProtocolError(f"the message has unknown fields: {', '.join(sorted(unknown))[:200]}")
    if others is not None and content.keys() != {"config"} | others:
        raise ProtocolError(f"the message must hold the records {', '.join(['config', *sorted(others)])}")
    return fields


def read_reply(content: RecordDict, kind: str, fields: Set[str], *, others: Set[str] = frozenset()) -> Fields:
    """The record ``config`` of a reply of ``kind``. Raises ProtocolError."""
    config = read_config(content, fields | {"outcome", "nonce", "protocol"}, others=others)
    check_protocol(config)
    value_of(config, "nonce", str)
    if (got := value_of(config, "outcome", str)) != kind:
        raise ProtocolError(f"expected a reply '{kind}', got '{got[:40]}'")
    return config


def check_protocol(config: Fields) -> None:
    """Raise ProtocolError unless this release understands the version."""
    version = value_of(config, "protocol", int)
    if version not in (PROTOCOL, PROTOCOL - 1):
        raise ProtocolError(
            f"the other side speaks protocol {version}, this release {PROTOCOL}: update the older of the two"
        )


def outcome(content: RecordDict) -> str:
    """What kind of reply this is: accepted, trained, ready, evaluated, phase, failed."""
    return value_of(read_config(content, None), "outcome", str)


def protocol_of(content: RecordDict) -> int | None:
    """The version in which ``content`` says it is written, None where it says none."""
    config = content.get("config")
    version = config.get("protocol") if isinstance(config, ConfigRecord) else None
    return version if isinstance(version, int) and not isinstance(version, bool) else None


def value_of(config: Fields, key: str, kind: type[T]) -> T:
    """The field ``key``, of type ``kind``. Raises ProtocolError."""
    value = config.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ProtocolError(f"the message field '{key}' is missing or not {kind.__name__}")
    return value


def digest_of_study(config: Fields) -> str:
    """The study's digest. Raises ProtocolError."""
    digest = value_of(config, "study", str)
    if len(digest) != 64 or set(digest) - _HEXADECIMAL:
        raise ProtocolError("the message names its study by something that is not a digest")
    return digest


def sha256_of(config: Fields, key: str) -> str:
    """The hash in field ``key``. Raises ProtocolError."""
    digest = value_of(config, key, str)
    if len(digest) != 64 or set(digest) - _HEXADECIMAL:
        raise ProtocolError(f"the message field '{key}' is not a hash")
    return digest


def count_of(config: Fields, key: str) -> int:
    """The number, 0 and above, in field ``key``. Raises ProtocolError."""
    count = value_of(config, key, int)
    if not 0 <= count < 2**32:
        raise ProtocolError(f"the message field '{key}' is not a count")
    return count


def heads_fields(heads: Mapping[Log, Head]) -> dict[str, str | int | bytes]:
    """``heads`` as fields of a configuration record."""
    fields: dict[str, str | int | bytes] = {}
    for log, head in heads.items():
        fields |= {f"{log.value}-rows": head.rows, f"{log.value}-head": head.digest}
    return fields


def heads_of(config: Fields) -> dict[Log, Head]:
    """The heads that are in ``config``. Raises ProtocolError."""
    heads: dict[Log, Head] = {}
    for log in Log:
        rows, head = f"{log.value}-rows", f"{log.value}-head"
        if rows not in config and head not in config:
            continue
        heads[log] = Head(count_of(config, rows), sha256_of(config, head))
    return heads


def tally_of(content: RecordDict) -> dict[str, float]:
    """The record ``tally``. Raises ProtocolError."""
    record = content.get("tally")
    if not isinstance(record, MetricRecord):
        raise ProtocolError("the message has no tally")
    tally: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list) or not isfinite(value) or not key.isprintable() or len(key) > _LONGEST_NAME:
            raise ProtocolError("a tally must hold finite numbers under short names")
        tally[key] = float(value)
    return tally
