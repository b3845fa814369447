"""Sees every message that passes a site's ClientApp, and what the node says itself, into the audit log."""

from __future__ import annotations

import logging

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Message, RecordDict

from medfl.client.audit import Audit
from medfl.client.notice import Notice
from medfl.client.receipts import Receipts
from medfl.client.site import Site
from medfl.shared.errors import Code, ProtocolError
from medfl.shared.messages import HeadsReply, HeadsRequest, Kind, Log, SecureRequest
from medfl.shared.observed import answer_in, digest_in, form_of, kind_of, measured, passage_of
from medfl.shared.passage import FAILED, Answer, Form, Passage

log = logging.getLogger("medfl.site")


class Witness:
    """Writes what one site receives and sends. Nothing that a coordinator wrote goes into a row unless it is a kind,
    a digest, a number, or the name of a study that parses.
    """

    def __init__(self, audit: Audit, site: Site, receipts: Receipts | None = None) -> None:
        """``receipts`` keeps what the coordinator signs of the log's heads."""
        self._audit, self._site, self._receipts = audit, site, receipts
        self._rounds: dict[str, int | None] = {}  # by study: messages of secure sums do not name the training round

    def passage(self, message: Message) -> Passage:
        """What ``message``, which may be malformed, is about."""
        if kind_of(message.metadata.message_type) == Kind.PHASE:
            return self._phase(message.content)
        passage = passage_of(message.metadata.message_type, message.content)
        if passage.kind != Kind.OFFER:
            self._rounds[passage.study] = passage.round
        return passage

    def received(self, passage: Passage, content: RecordDict) -> None:
        """Before anything is done with a message. Raises PolicyRefusal: nothing may be done then."""
        self._audit.received(passage, measured(content))

    def leaves(self, passage: Passage, content: RecordDict) -> None:
        """Before ``content``, one of MedFL's replies, leaves. Raises PolicyRefusal: it may not leave then."""
        form = form_of(content)
        price = None if form is Form.NOTHING else self._site.price(passage.study)
        journal = self._site.journal_mark(passage.study) if passage.kind == Kind.PHASE else None
        answer = answer_in(content)
        self._audit.leaves(passage, answer, form=form, content=measured(content), price=price, journal=journal)

    def countersigned(self, request: HeadsRequest, reply: HeadsReply) -> HeadsReply:
        """``reply`` with the head of the audit log; keeps the receipt that came along, where the log holds its head.

        Raises:
            PolicyRefusal: the receipt is not signed by the consortium. ProtocolError: it is malformed.
        """
        recorded, held = request.recorded.get(Log.AUDIT), True
        if recorded is not None and not self._audit.holds(recorded):
            held = False
            self._audit.not_held(recorded)
            log.error(
                "the coordinator has seen row %d of this site's audit log, which is not in it as it was: the log was "
                "cut, restored from a backup, or begun anew; keep all its copies and run audit verify",
                recorded.rows,
            )
        if request.receipt and self._receipts is not None:
            self._receipts.keep(request.receipt, self._audit)
        return HeadsReply({**reply.heads, Log.AUDIT: self._audit.head}, held)

    def node_says(self, notice: Notice, code: Code, reason: str) -> None:
        """Before the node answers in the ClientApp's place. Raises PolicyRefusal."""
        passage = Passage(kind_of(notice.message_type), digest_in(notice.digest))
        self._audit.leaves(passage, Answer(FAILED, code.value, reason), form=Form.NOTHING)

    def _phase(self, content: RecordDict) -> Passage:
        try:
            request = SecureRequest.parse(content)
        except ProtocolError:
            return Passage(Kind.PHASE)
        study = digest_in(self._site.study_of(request))
        return Passage(Kind.PHASE, study, self._rounds.get(study), phase=request.phase.value)
