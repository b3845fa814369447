"""Flower's Grid directly on the link state: what a ServerApp sends with, and where its replies arrive.

One of the four ``server/link*.py`` files, the only ones of the server that touch Flower's private modules.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import inf

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Error, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import ErrorCode, Status
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.run import Run

from medfl.server.link_inflate import inflate
from medfl.server.link_state import FleetState
from medfl.server.longpoll import Bell
from medfl.shared.errors import ProtocolError

log = logging.getLogger("medfl.link")

LOOK_AGAIN_S = 0.5  # replies ring a bell; lost nodes do not
KEPT_S = 30.0  # so long after its time is over, nobody waits for a reply: what has come of it goes
GRACE_S = 1.0  # after its time to live a message is reported as expired, unless its sender stopped waiting before

hashed_once = no_object_id_recompute
"""Context in which one content that goes to many sites is hashed once; nothing in it may change meanwhile."""


@dataclass(slots=True)
class _Sent:
    """An instruction on its way, without content; ``reply`` once its answer began to arrive."""

    instruction: Message
    reply: str | None = None


class LinkGrid(Grid):
    """Flower's Grid directly on the link state: no HTTP, no polling interval, no second copy of a model.

    Errors that the link itself reports (node lost, reply incomplete) come as replies of the node concerned.
    """

    def __init__(self, state: FleetState, run: Run, orders: Bell, replies: Bell, max_object_bytes: int) -> None:
        self._state = state
        self._run = run
        self._orders = orders
        self._replies = replies
        self._max_object_bytes = max_object_bytes
        self._sent: dict[str, _Sent] = {}
        self._last_created_at = 0.0
        self._look_at = 0.0  # when what nobody waits for is looked for again

    def set_run(self, run: Run) -> None:
        """Set by :meth:`Link.run`."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid works in."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """``flwr.app.Message(...)``, under the name that Flower keeps for old applications."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are online now."""
        return self._state.get_nodes(self._run.run_id)

    def get_nodes(self) -> Sequence[NodeInfo]:
        """The same nodes, with their names."""
        return self._state.get_node_info(node_ids=list(self.get_node_ids()))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand over ``messages``; returns their ids. A node that is not there is reported by its reply.

        Raises:
            ProtocolError: the run has been closed, or a single object is larger than a node accepts.
        """
        ids: list[str] = []
        with no_object_id_recompute():  # one hash of a model that goes to many sites
            for message in messages:
                ids.append(self._push(message))
        self._orders.ring()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to ``message_ids`` that are complete now. What has been read is no longer held here."""
        wanted = [(message_id, self._sent[message_id]) for message_id in message_ids if message_id in self._sent]
        self._drop_forsaken({message_id for message_id, _ in wanted})
        # The nodes are looked at first: a reply stored by a node that left afterwards still counts.
        left_at = self._left_at(wanted)
        self._find_replies(wanted)
        done: list[Message] = []
        for message_id, sent in wanted:
            reply = self._collect(sent, left_at)
            if reply is not None:
                done.append(reply)
                self._forget([message_id])
        return done

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send ``messages`` and return the replies that are there after ``timeout`` seconds at the latest."""
        return list(self.stream(messages, timeout=timeout))

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send ``messages`` now and give each reply as it arrives, until all have or ``timeout`` seconds are over.

        The messages' time to live is shortened to ``timeout``: a late reply is refused, and an instruction that was
        not fetched in time is withdrawn. Memory holds what has arrived and was not yet taken.
        """
        batch = list(messages)
        for message in batch:
            message.metadata.ttl = min(message.metadata.ttl, timeout or message.metadata.ttl)
        limit = max((message.metadata.ttl for message in batch), default=0.0)
        waiting = set(self.push_messages(batch))
        return self._stream(waiting, time.monotonic() + limit)

    def _stream(self, waiting: set[str], until: float) -> Iterator[Message]:
        try:
            while waiting:
                seen = self._replies.count
                for reply in self.pull_messages(waiting):
                    waiting.discard(reply.metadata.reply_to_message_id)
                    yield reply
                left = until - time.monotonic()
                if left <= 0:
                    return
                if waiting:
                    self._replies.wait(seen, min(left, LOOK_AGAIN_S))
        finally:
            self._forget(waiting)

    def _push(self, message: Message) -> str:
        # Time to live counts from here. Equal instructions would be one object: their times differ by a microsecond.
        self._last_created_at = max(time.time(), self._last_created_at + 1e-6)
        message.metadata.created_at = self._last_created_at
        run_id = self._run.run_id
        head = remove_content_from_message(message)
        message_id = message.object_id
        message.metadata.__dict__["_message_id"] = head.metadata.__dict__["_message_id"] = message_id
        session = self._state.start_session(run_id)
        self._sent[message_id] = _Sent(head)
        stored, missing = self._state.store_message_and_object_tree(head, get_object_tree(message), session)
        if not stored and self._state.get_run_info(run_ids=[run_id])[0].status.status == Status.FINISHED:
            raise ProtocolError("the run has been closed: start it again")
        wanted = set(missing)
        for object_id, part in get_all_nested_objects(message).items():
            if object_id in wanted:
                content = part.deflate()
                if len(content) > self._max_object_bytes:
                    self._forget([message_id])
                    raise ProtocolError(
                        f"a {type(part).__name__} of {len(content)} bytes is more than a node accepts in one piece: "
                        "put arrays into an ArrayRecord"
                    )
                self._state.store_object(run_id, session, object_id, content)
        return message_id

    def _drop_forsaken(self, wanted: set[str]) -> None:
        """Let go of what is over and not ``wanted``: a reply that comes too late would be held until the run ends."""
        now = time.time()
        if abs(now - self._look_at) < GRACE_S:
            return
        self._look_at = now
        forsaken = [
            (message_id, sent)
            for message_id, sent in list(self._sent.items())
            if message_id not in wanted and _end(sent) + KEPT_S < now
        ]
        self._find_replies(forsaken)
        self._forget(message_id for message_id, _ in forsaken)

    def _left_at(self, wanted: list[tuple[str, _Sent]]) -> dict[int, float]:
        """When each node last left, as a Unix time (0: never); infinity for a node that is not online now."""
        ids = {sent.instruction.metadata.dst_node_id for _, sent in wanted}
        left = dict.fromkeys(ids, inf)
        for info in self._state.get_node_info(node_ids=list(ids), statuses=["online"]):
            at = info.last_deactivated_at
            left[info.node_id] = datetime.fromisoformat(at).timestamp() if at else 0.0
        return left

    def _find_replies(self, wanted: list[tuple[str, _Sent]]) -> None:
        """Note which replies have begun to arrive."""
        ids = [message_id for message_id, sent in wanted if sent.reply is None]
        for message_id, reply in self._state.replies_to(ids).items():
            if (sent := self._sent.get(message_id)) is not None:
                sent.reply = reply

    def _collect(self, sent: _Sent, left_at: Mapping[int, float]) -> Message | None:
        """The complete reply, an error in its place, or None while there is hope."""
        order = sent.instruction.metadata
        # A node that has left since then will not answer: it keeps nothing of what it was working on.
        unfinished: Message | None = None
        if left_at[order.dst_node_id] > order.created_at:
            unfinished = _error(sent, ErrorCode.NODE_UNAVAILABLE)
        elif _end(sent) + GRACE_S < time.time():
            unfinished = _error(sent, ErrorCode.MESSAGE_UNAVAILABLE)
        if sent.reply is None:
            return unfinished
        contents: dict[str, bytes] = {}
        try:
            for node in iterate_object_tree(self._state.object_store.get_object_tree(sent.reply)):
                content = self._state.get_object(self._run.run_id, node.object_id)
                if content is None:
                    raise NoObjectInStoreError(node.object_id)
                if content == b"":
                    return unfinished
                contents[node.object_id] = content
            self._state.object_store.delete(sent.reply)
            del content
            message = inflate(sent.reply, contents)
        except NoObjectInStoreError:  # its upload stopped for an hour
            return _error(sent, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
        except Exception:  # whatever a node's bytes make Flower's parsers raise
            log.warning("node %d sent a reply that cannot be read", order.dst_node_id)
            return _error(sent, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
        if message is None or not _answers(message, order.message_id, order.dst_node_id):
            log.warning("node %d sent a reply that is not one", order.dst_node_id)
            return _error(sent, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
        message.metadata.__dict__["_message_id"] = sent.reply
        return message

    def _forget(self, message_ids: Iterable[str]) -> None:
        """Withdraw instructions and drop whatever is held of them and of their replies."""
        ids = set(message_ids)
        self._state.delete_messages(ids)
        for message_id in ids:
            sent = self._sent.pop(message_id, None)
            self._state.object_store.delete(message_id)
            if sent is not None and sent.reply:
                self._state.object_store.delete(sent.reply)


def _end(sent: _Sent) -> float:
    """When its time to live is over, as a Unix time."""
    return sent.instruction.metadata.created_at + sent.instruction.metadata.ttl


def _error(sent: _Sent, code: int) -> Message:
    return Message(Error(code), reply_to=sent.instruction)


def _answers(reply: Message, message_id: str, node_id: int) -> bool:
    metadata = reply.metadata
    return metadata.reply_to_message_id == message_id and metadata.src_node_id == node_id
