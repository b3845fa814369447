"""Reads a message for an audit log: what it is about, how large it is, and how results stand in it."""

from __future__ import annotations

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from medfl.shared.errors import ProtocolError
from medfl.shared.messages import Failure, Kind, StudyOffer, outcome
from medfl.shared.passage import FAILED, Answer, Content, Form, Passage
from medfl.shared.study import Study

_HEXADECIMAL = frozenset("0123456789abcdef")


def kind_of(message_type: str) -> str:
    """The kind of a message, or ``unknown``."""
    return message_type if message_type in {kind.value for kind in Kind} else "unknown"


def passage_of(message_type: str, content: RecordDict) -> Passage:
    """What a request that may be malformed is about, except for those of secure sums, which name no study."""
    kind = kind_of(message_type)
    config = content.get("config")
    values = dict(config) if isinstance(config, ConfigRecord) else {}
    number = values.get("server-round")
    known = isinstance(number, int) and not isinstance(number, bool) and 0 < number < 2**32
    name = _name(content) if kind == Kind.OFFER else ""
    return Passage(
        kind, digest_in(values.get("study")), number if known and isinstance(number, int) else None, name=name
    )


def measured(content: RecordDict) -> Content:
    """Size and digest of ``content``."""
    size = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            size += sum(len(array.data) for array in record.values())
        else:
            size += len(record.deflate())
    return Content(size, content.object_id)


def form_of(content: RecordDict) -> Form:
    """How results stand in ``content``, judged by what is in it and not by what the study promises."""
    if "masked" in content:
        return Form.MASKED
    results = (record for record in content.values() if isinstance(record, ArrayRecord | MetricRecord))
    return Form.CLEAR if any(len(record) for record in results) else Form.NOTHING


def answer_in(content: RecordDict) -> Answer:
    """What a reply says. Raises ProtocolError when it is malformed."""
    what = outcome(content)
    if what != FAILED:
        return Answer(what)
    failure = Failure.parse(content)
    return Answer(what, failure.code.value, failure.reason)


def digest_in(value: object) -> str:
    """``value`` where it is a study's digest, else nothing."""
    return value if isinstance(value, str) and len(value) == 64 and not set(value) - _HEXADECIMAL else ""


def _name(content: RecordDict) -> str:
    """Of the study in an offer, where the study parses: its name is then one of a few harmless letters."""
    try:
        offer = StudyOffer.parse(content)
        return Study.from_canonical(offer.canonical, digest=offer.digest).name
    except ProtocolError:
        return ""
