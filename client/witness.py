"""Sees every message that passes a site's ClientApp, and what the node says itself, into the audit log."""

from __future__ import annotations

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from medfl.client.audit import Answer, Audit, Content, Form, Passage
from medfl.client.node import Notice
from medfl.client.site import Site
from medfl.shared.errors import Code, ProtocolError
from medfl.shared.messages import Failure, Kind, SecureRequest, StudyOffer, outcome
from medfl.shared.study import Study

_FAILED = "failed"
_HEXADECIMAL = frozenset("0123456789abcdef")


class Witness:
    """Writes what one site receives and sends. Nothing that a coordinator wrote goes into a row unless it is a kind,
    a digest, a number, or the name of a study that parses.
    """

    def __init__(self, audit: Audit, site: Site) -> None:
        self._audit, self._site = audit, site
        self._rounds: dict[str, int | None] = {}  # by study: messages of secure sums do not name the training round

    def passage(self, message: Message) -> Passage:
        """What ``message``, which may be malformed, is about."""
        kind, content = _kind(message.metadata.message_type), message.content
        if kind == Kind.PHASE:
            return self._phase(content)
        config = content.get("config")
        values = dict(config) if isinstance(config, ConfigRecord) else {}
        study, number = _digest(values.get("study")), values.get("server-round")
        known = isinstance(number, int) and not isinstance(number, bool) and 0 < number < 2**32
        round_number = number if known and isinstance(number, int) else None
        if kind != Kind.OFFER:
            self._rounds[study] = round_number
        return Passage(kind, study, round_number, name=_name(content) if kind == Kind.OFFER else "")

    def received(self, passage: Passage, content: RecordDict) -> None:
        """Before anything is done with a message. Raises PolicyRefusal: nothing may be done then."""
        self._audit.received(passage, measured(content))

    def leaves(self, passage: Passage, content: RecordDict) -> None:
        """Before ``content``, one of MedFL's replies, leaves. Raises PolicyRefusal: it may not leave then."""
        form = form_of(content)
        price = None if form is Form.NOTHING else self._site.price(passage.study)
        self._audit.leaves(passage, _answer_in(content), form=form, content=measured(content), price=price)

    def node_says(self, notice: Notice, code: Code, reason: str) -> None:
        """Before the node answers in the ClientApp's place. Raises PolicyRefusal."""
        passage = Passage(_kind(notice.message_type), _digest(notice.digest))
        self._audit.leaves(passage, Answer(_FAILED, code.value, reason), form=Form.NOTHING)

    def _phase(self, content: RecordDict) -> Passage:
        try:
            request = SecureRequest.parse(content)
        except ProtocolError:
            return Passage(Kind.PHASE)
        study = _digest(self._site.study_of(request))
        return Passage(Kind.PHASE, study, self._rounds.get(study), phase=request.phase.value)


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


def _answer_in(content: RecordDict) -> Answer:
    what = outcome(content)
    if what != _FAILED:
        return Answer(what)
    failure = Failure.parse(content)
    return Answer(what, failure.code.value, failure.reason)


def _kind(message_type: str) -> str:
    return message_type if message_type in set(Kind) else "unknown"


def _digest(value: object) -> str:
    return value if isinstance(value, str) and len(value) == 64 and not set(value) - _HEXADECIMAL else ""


def _name(content: RecordDict) -> str:
    try:
        offer = StudyOffer.parse(content)
        return Study.from_canonical(offer.canonical, digest=offer.digest).name
    except ProtocolError:
        return ""
