"""The site's end of the wire: Flower's fleet protocol, spoken with Flower's own client, signature and serialisation.

It and :mod:`medfl.client.connection` are the only client files that touch Flower's private modules (flwr is pinned
exactly; tests/client/test_fleet_contract.py says what is relied on): ``flwr.supernode.fleet_http_client``,
``flwr.supernode.node_auth_http_interceptor``, ``flwr.supercore.protobuf.client`` (its ``_client``),
``flwr.supercore.inflatable``, ``flwr.common.serde``, ``flwr.app.message.remove_content_from_message`` and
``_message_id`` of message metadata, ``flwr.proto``.

Every method is one step of the protocol. What a coordinator sends is bounded and checked before it is used.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from medfl.client.connection import Connection
from medfl.client.transport import Kind, LinkTrouble, Patience, TransportSettings
from medfl.shared.checkin import PATH
from medfl.shared.errors import Code, ProtocolError

HEARTBEAT_S = 10  # the least Flower accepts; a node is gone after two
MAX_SESSIONS = 5  # a reply is offered this often before it is given up


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """How to reach the coordinator, who we are, and what we accept."""

    transport: TransportSettings
    node_key: Path
    max_object_bytes: int = 16 * 1024 * 1024  # one piece, either way
    max_message_bytes: int = 4 * 1024**3  # a whole message, either way
    max_objects: int = 10_000
    wait_s: int = 2  # how long an empty question may be held by a coordinator that can


@dataclass(frozen=True, slots=True)
class Order:
    """An instruction that has been announced: its Flower head, without content, and where its content is."""

    head: Message
    tree: ObjectTree

    @property
    def until(self) -> float:
        """When the coordinator stops waiting for the reply, as a Unix time."""
        return self.head.metadata.created_at + self.head.metadata.ttl


@dataclass(frozen=True, slots=True)
class Run:
    """What a run says about itself: the study's name and digest, and the series whose state it continues."""

    run_id: int
    series_id: int
    study: str
    digest: str


class Fleet:
    """One node's calls on the coordinator.

    Methods raise LinkTrouble (see :mod:`medfl.client.transport`). Those that take ``patience`` repeat each request
    that may be repeated while the trouble passes, so that a broken upload goes on where it broke.

    Raises on construction:
        ConfigError: a key or certificate is missing, malformed, readable by others, expired, or of elsewhere.
    """

    def __init__(self, settings: FleetSettings) -> None:
        self.settings = settings
        self._connection = Connection(settings.transport, settings.node_key, wait_s=settings.wait_s)

    def close(self) -> None:
        """Close connections; running transfers fail."""
        self._connection.close()

    def check_in(self, question: bytes) -> bytes | None:
        """Ask what :mod:`medfl.shared.checkin` describes; None from a coordinator that does not know check-ins."""
        coordinator = self.settings.transport.coordinator
        status, answer = self._connection.post(PATH, question)
        match status:
            case HTTPStatus.OK:
                return answer
            case HTTPStatus.NOT_FOUND:
                return None
            case HTTPStatus.FORBIDDEN:
                raise LinkTrouble(Kind.NOT_ENROLLED, f"{coordinator} does not know this site under its site key")
            case _:
                raise LinkTrouble(Kind.BUSY, f"{coordinator}: HTTP {status} to a check-in")

    def reload_certificate(self) -> None:
        """Take up a certificate that was renewed on the disk; connections from now on show it."""
        self._connection.reload_certificate()

    def check(self) -> None:
        """One connection, one authenticated request, no change at the coordinator.

        Raises:
            LinkTrouble: unreachable, not who we expect, or we are not whom it expects.
        """
        # An interval of 0 is never accepted, and Flower looks at it only after it has found our key.
        self._connection.begin()
        try:
            self._connection.call(
                self._connection.client.ActivateNode, ActivateNodeRequest(public_key=self._connection.public_key)
            )
        except LinkTrouble as trouble:
            match trouble.kind, trouble.status:
                case Kind.REFUSED, 400:
                    return
                case Kind.REFUSED, 412:
                    raise self._not_enrolled() from None
                case _:
                    raise
        raise ProtocolError("the coordinator accepted a heartbeat interval of 0: it is not a MedFL coordinator")

    def join(self, former_id: int | None) -> int:
        """Come online and return our node id.

        ``former_id`` is our id when we may still be online from before, killed or cut off: that session is closed
        first, and the coordinator learns that what it had in hand is lost.

        Raises:
            LinkTrouble: above all NOT_ENROLLED, and BUSY while another node uses our key.
        """
        self._connection.begin()
        self.reload_certificate()
        if former_id is not None:
            try:
                self._connection.call(self._connection.client.DeactivateNode, DeactivateNodeRequest(node_id=former_id))
            except LinkTrouble as trouble:
                if trouble.kind not in (Kind.REFUSED, Kind.NOT_ENROLLED):  # not online, or under another id now
                    raise
        request = ActivateNodeRequest(public_key=self._connection.public_key, heartbeat_interval=HEARTBEAT_S)
        try:
            return self._connection.call(self._connection.client.ActivateNode, request).node_id
        except LinkTrouble as trouble:
            if (trouble.kind, trouble.status) != (Kind.REFUSED, 412):
                raise
        self.check()
        raise LinkTrouble(
            Kind.BUSY,
            f"{self.settings.transport.coordinator}: another node is online with this site's key, or was until "
            f"{2 * HEARTBEAT_S} s ago: is a second medfl-client running?",
        )

    def leave(self, node_id: int) -> None:
        """Go offline."""
        self._connection.call(self._connection.client.DeactivateNode, DeactivateNodeRequest(node_id=node_id))

    def beat(self, node_id: int) -> None:
        """Say that we are alive; due every HEARTBEAT_S seconds."""
        request = SendNodeHeartbeatRequest(node=NodeProto(node_id=node_id), heartbeat_interval=HEARTBEAT_S)
        if not self._connection.call(self._connection.client.SendNodeHeartbeat, request).success:
            raise self._not_enrolled()

    def next_order(self, node_id: int) -> Order | None:
        """The next instruction, or None; a MedFL coordinator holds the question for up to ``wait_s`` seconds.

        Not repeated here: an answer that gets lost on the way takes its instruction with it. Join again after trouble.
        """
        answer = self._connection.call(
            self._connection.client.PullMessages, PullMessagesRequest(node=NodeProto(node_id=node_id))
        )
        if not answer.messages_list:
            return None
        if len(answer.messages_list) != 1 or len(answer.message_object_trees) != 1:
            raise ProtocolError("the coordinator sent several messages at once")
        order = Order(message_from_proto(answer.messages_list[0]), answer.message_object_trees[0])
        head = order.head.metadata
        if head.dst_node_id != node_id or head.message_id != order.tree.object_id:
            raise ProtocolError("the coordinator sent a message that is not for this site")
        return order

    def run_of(self, order: Order, patience: Patience) -> Run:
        """What the run of ``order`` says about itself."""
        head = order.head.metadata
        request = GetRunRequest(node=NodeProto(node_id=head.dst_node_id), run_id=head.run_id)
        run = self._connection.call(self._connection.client.GetRun, request, patience).run
        return Run(run.run_id, run.series_id, run.fab_id.removeprefix("medfl/"), run.fab_hash)

    def fetch(self, order: Order, patience: Patience) -> Message:
        """The whole message.

        Raises:
            ProtocolError: it is too large, incomplete, altered or unreadable.
        """
        head, settings = order.head.metadata, self.settings
        node = NodeProto(node_id=head.dst_node_id)
        ids = list(dict.fromkeys(part.object_id for part in iterate_object_tree(order.tree)))
        if len(ids) > settings.max_objects:
            raise ProtocolError(f"a message of {len(ids)} objects exceeds this site's cap of {settings.max_objects}")

        def pull(object_id: str) -> bytes:
            request = PullObjectRequest(node=node, run_id=head.run_id, object_id=object_id)
            while not (
                answer := self._connection.call(self._connection.client.PullObject, request, patience)
            ).object_available:
                if not answer.object_found or not patience.pause():
                    raise ProtocolError("a part of the message is missing at the coordinator")
            if len(answer.object_content) > settings.max_object_bytes:
                raise ProtocolError(f"a part of the message exceeds this site's cap of {settings.max_object_bytes}")
            if hashlib.sha256(answer.object_content).hexdigest() != object_id:
                raise ProtocolError("a part of the message is not what was announced")
            return answer.object_content

        contents: dict[str, bytes] = {}
        left, began = settings.max_message_bytes, time.monotonic()
        for object_id, content in zip(ids, self._connection.each(pull, ids), strict=True):
            contents[object_id] = content
            left -= len(content)
            if left < 0:
                raise ProtocolError(f"the message exceeds this site's cap of {settings.max_message_bytes} bytes")
        self._connection.note_speed(settings.max_message_bytes - left, time.monotonic() - began)
        try:
            message = inflate_object_from_contents(head.message_id, contents)
        except Exception:  # whatever foreign bytes make Flower's parsers raise
            raise ProtocolError("the message cannot be read") from None
        if not isinstance(message, Message) or not _same(message, order.head) or not message.has_content():
            raise ProtocolError("the message is not the one that was announced")
        message.metadata.__dict__["_message_id"] = head.message_id
        # Frees the coordinator's memory; it forgets the message with the reply at the latest, so nobody waits for this.
        request = ConfirmMessageReceivedRequest(node=node, run_id=head.run_id, message_object_id=head.message_id)
        self._connection.soon(self._connection.client.ConfirmMessageReceived, request)
        return message

    def send(self, reply: Message, patience: Patience, *, work_s: float = 0.0) -> int:
        """Hand in ``reply``; returns the bytes sent, 0 when the coordinator no longer wants it.

        Raises:
            ProtocolError: a part is larger than a coordinator accepts, or the coordinator does not keep what it gets.
        """
        metadata = reply.metadata
        node = NodeProto(node_id=metadata.src_node_id)
        with no_object_id_recompute():
            metadata.__dict__["_message_id"] = reply.object_id
            tree = get_object_tree(reply)
            parts = get_all_nested_objects(reply)
        request = PushMessagesRequest(
            node=node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree],
            clientapp_runtime_list=[work_s],
        )

        def push(object_id: str) -> tuple[int, bool]:
            content = parts[object_id].deflate()
            if len(content) > self.settings.max_object_bytes:
                raise ProtocolError("a part of the reply is too large for one piece: arrays belong in an ArrayRecord")
            piece = PushObjectRequest(
                node=node,
                run_id=metadata.run_id,
                object_id=object_id,
                object_content=content,
                session_id=answer.session_id,
            )
            return len(content), self._connection.call(self._connection.client.PushObject, piece, patience).stored

        sent = 0
        for _ in range(MAX_SESSIONS):
            answer = self._connection.call(self._connection.client.PushMessages, request, patience)
            pieces = [part for part in answer.objects_to_push if part in parts]
            results = list(self._connection.each(push, pieces))
            sent += sum(size for size, _ in results)
            if all(stored for _, stored in results):
                return sent
            # The upload paused for too long, or another site's equal part came first: ask what is still missing.
        raise ProtocolError("the coordinator does not keep this site's reply")

    def _not_enrolled(self) -> LinkTrouble:
        coordinator, key = self.settings.transport.coordinator, self._connection.fingerprint
        text = f"{coordinator} does not know this site's node key ({key}): have the coordinator add it to its roster"
        return LinkTrouble(Kind.NOT_ENROLLED, text)


def refusal(order: Order, reason: str) -> Message:
    """The reply of a site that will not: ``reason`` is a short fixed word group."""
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, f"{Code.REFUSED}: {reason}"), reply_to=order.head)


def failure(order: Order, code: Code) -> Message:
    """The reply of a site that could not. Only the code is sent, never a text."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, code.value), reply_to=order.head)


def state_bytes(context: Context) -> bytes:
    """``context`` for the disk."""
    return bytes(context_to_proto(context).SerializeToString(deterministic=True))


def read_state(content: bytes) -> RecordDict:
    """``Context.state`` from the disk. Raises an exception of Flower's or protobuf's when damaged."""
    return context_from_proto(ContextProto.FromString(content)).state


def _same(message: Message, head: Message) -> bool:
    """Whether a fetched message carries the metadata that was announced for it."""
    got, said = message.metadata, head.metadata
    return (got.run_id, got.src_node_id, got.dst_node_id, got.message_type, got.group_id, got.created_at, got.ttl) == (
        (said.run_id, said.src_node_id, said.dst_node_id, said.message_type, said.group_id, said.created_at, said.ttl)
    )
