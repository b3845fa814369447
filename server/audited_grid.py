"""A Grid that lets the coordinator's audit log see every message before it goes out, and every reply that comes in."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Protocol

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Message
from flwr.serverapp import Grid

from medfl.server.audit import Audit
from medfl.server.link_grid import hashed_once
from medfl.server.passing_grid import PassingGrid
from medfl.shared.errors import Code, ProtocolError
from medfl.shared.messages import Kind, SecureRequest
from medfl.shared.observed import answer_in, form_of, kind_of, measured, passage_of
from medfl.shared.passage import FAILED, Answer, Form, Passage

_GRACE_S = 60.0  # the link reports an expired message a little later


class Members(Protocol):
    """Who the nodes are."""

    @property
    def names(self) -> Mapping[int, str]:
        """Node id -> site name, of all enrolled sites."""
        ...


class AuditedGrid(PassingGrid):
    """As ``grid``; ``members`` knows the sites of its nodes."""

    def __init__(self, grid: Grid, audit: Audit, *, study: str, members: Members) -> None:
        super().__init__(grid)
        self._audit, self._study, self._members = audit, study, members
        self._asked: dict[str, tuple[Passage, float]] = {}  # by message id, until it is answered or has expired
        self._round: int | None = None  # messages of secure sums do not name it

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the grid does, once the messages are in the log. Raises PolicyRefusal where it cannot be written."""
        outgoing = list(messages)
        passages = [self._passage(message) for message in outgoing]
        with hashed_once():
            rows = [
                (self._name(message.metadata.dst_node_id), passage, measured(message.content))
                for message, passage in zip(outgoing, passages, strict=True)
            ]
        self._audit.leaves(rows)
        identities = list(self._grid.push_messages(outgoing))
        now = time.monotonic()
        self._asked = {identity: asked for identity, asked in self._asked.items() if asked[1] > now}
        for identity, passage, message in zip(identities, passages, outgoing, strict=True):
            self._asked[identity] = passage, now + message.metadata.ttl + _GRACE_S
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the grid does. What came in is durable when a pull finds nothing more, or when all have answered."""
        wanted = set(message_ids)
        replies = list(self._grid.pull_messages(wanted))
        for reply in replies:
            asked, _ = self._asked.pop(reply.metadata.reply_to_message_id, (Passage("unknown", self._study), 0.0))
            self._note(self._name(reply.metadata.src_node_id), asked, reply)
        if len(replies) in (0, len(wanted)):
            self._audit.flush()
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not used: rounds push and pull."""
        raise NotImplementedError

    def _passage(self, message: Message) -> Passage:
        kind, content = message.metadata.message_type, message.content
        if kind_of(kind) == Kind.PHASE:
            return Passage(Kind.PHASE, self._study, self._round, phase=SecureRequest.parse(content).phase.value)
        passage = passage_of(kind, content)
        self._round = passage.round or self._round
        return passage

    def _note(self, site: str, asked: Passage, reply: Message) -> None:
        if reply.has_error():
            self._audit.received(site, asked, Answer(FAILED, Code.NETWORK.value, "unavailable"), Form.NOTHING, None)
            return
        try:
            answer = answer_in(reply.content)
        except ProtocolError:
            answer = Answer(FAILED, Code.PROTOCOL.value, "malformed reply")
        self._audit.received(site, asked, answer, form_of(reply.content), measured(reply.content))

    def _name(self, node: int) -> str:
        return self._members.names.get(node, f"node {node}")
