"""The coordinator's end of the wire: Flower's SuperLink application, embedded, behind the guard.

The only server file that touches Flower's private modules (flwr is pinned exactly; tests/server/test_link_contract.py
says what is relied on): ``flwr.superlink.main.create_app``, ``flwr.superlink.config_loader``,
``flwr.superlink.auth_plugin``, ``flwr.superlink.federation``, ``flwr.server.superlink.linkstate``,
``flwr.supercore.object_store``, ``flwr.supercore.inflatable``, ``flwr.supercore.task_identity``,
``flwr.supercore.state.schema``, ``flwr.supercore.run``, ``flwr.supercore.constant``, ``flwr.common.constant``,
``flwr.app.message.remove_content_from_message`` and ``_message_id`` of message metadata, ``flwr.proto``.

Nodes and run series live in a database file, so that a restarted coordinator is the one the sites know. Messages and
their payloads live in memory: an interrupted run is closed at the next start, and no site's update touches the disk.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from math import inf
from pathlib import Path
from typing import Self

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import uvicorn
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode, Status, SubStatus
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.serverapp import Grid
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.state.schema.linkstate_models import MessageRes as ReplyRow
from flwr.supercore.state.schema.linkstate_models import Node as NodeRow
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.main import create_app
from sqlalchemy import select, update

from medfl.server.guard import Guard, Limits
from medfl.server.longpoll import Bell, LongPoll
from medfl.shared.certificates import check_certificate
from medfl.shared.errors import ConfigError, NetworkError, ProtocolError
from medfl.shared.files import PRIVATE_FILE, private_folder
from medfl.shared.keys import node_public_key, read_private

log = logging.getLogger("medfl.link")

RUN_HEARTBEAT_S = 10.0  # Flower closes a run after 60 s without
LOOK_AGAIN_S = 0.5  # replies ring a bell; lost nodes do not


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Where to listen, who we are, and what is let in."""

    host: str
    port: int  # 0 takes any free port: see Link.port
    authority: Path  # certificate of the consortium's authority, PEM
    certificate: Path
    key: Path
    state_dir: Path
    limits: Limits = field(default_factory=Limits)
    max_connections: int = 512


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run in progress: give ``grid`` and ``context`` to a ServerApp; keep ``series_id`` to go on later."""

    grid: LinkGrid
    context: Context
    run_id: int
    series_id: int


class Link:
    """An embedded SuperLink: ``with Link(settings) as link: ...`` serves until the block ends.

    Raises on entry:
        ConfigError: a certificate or key is missing, expired, not ours, or readable by others.
        NetworkError: the address cannot be listened on.
    """

    def __init__(self, settings: LinkSettings) -> None:
        self.settings = settings
        self.port = settings.port
        self._sites: dict[str, int] = {}
        self._run_open = threading.Lock()

    def __enter__(self) -> Self:
        """Open the database, close what a dead coordinator left open, and serve."""
        for chatty in ("flwr", "alembic", "uvicorn"):  # flwr would format every request and query
            logging.getLogger(chatty).setLevel(logging.WARNING)
        context = self._tls()
        listener = self._listen()
        try:
            self._orders, self._replies = Bell(), Bell()
            factory = LinkStateFactory(str(self._database()), NoOpFederationManager(), ObjectStoreFactory())
            state = factory.state()
            assert isinstance(state, SqlLinkState)  # noqa: S101 - what Flower makes of a file's path
            self._state = state
            self._close_stale_runs()
            app = create_app(_superlink_config(self.settings), _NoLegacyServers)  # type: ignore[arg-type]
            app.state.linkstate_factory = app.state.runtime_state_factory = factory
            self._long_poll = LongPoll(app, orders=self._orders, replies=self._replies)
            config = uvicorn.Config(
                Guard(self._long_poll, self.settings.limits),
                ssl_context_factory=lambda *_: context,
                log_config=None,
                access_log=False,
                lifespan="on",
                ws="none",
                proxy_headers=False,
                server_header=False,
                limit_concurrency=self.settings.max_connections,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=5,
            )
            self._server = uvicorn.Server(config)
            self._thread = threading.Thread(target=self._server.run, args=([listener],), name="link", daemon=True)
            self._thread.start()
            while not self._server.started:
                if not self._thread.is_alive():
                    raise NetworkError("the fleet interface did not start: see the log above")
                time.sleep(0.01)
        except BaseException:
            listener.close()
            raise
        log.info("listening on %s port %d", self.settings.host, self.port)
        return self

    def __exit__(self, *_: object) -> None:
        """Let running requests end (5 s at most) and close the port."""
        self._long_poll.closing = True
        self._orders.ring()
        self._server.should_exit = True
        self._thread.join(10)

    def enrol(self, roster: Mapping[str, str | bytes]) -> dict[str, int]:
        """Make the known nodes exactly those of ``roster`` (site name: public node key); returns their node ids.

        A site whose key is no longer in the roster is cut off at once; when it comes back, it has its old id again.

        Raises:
            ConfigError: a key is malformed, or two sites have the same.
        """
        keys = {site: node_public_key(key) for site, key in roster.items()}
        owners: dict[bytes, str] = {}
        for site, key in keys.items():
            if key in owners:
                raise ConfigError(f"sites {owners[key]} and {site} have the same node key: each needs its own")
            owners[key] = site
        for node in self._state.get_node_info(statuses=["registered", "online", "offline"]):
            if node.public_key not in owners:
                self._state.delete_node(NOOP_FLWR_AID, node.node_id)
                log.warning("node %d is no longer in the roster: cut off", node.node_id)
        for site, key in keys.items():
            self._sites[site] = self._node_of(site, key)
        self._sites = {site: self._sites[site] for site in keys}
        return dict(self._sites)

    def online(self) -> set[int]:
        """Ids of the enrolled nodes that have been heard of within two heartbeats."""
        online = {node.node_id for node in self._state.get_node_info(statuses=["online"])}
        return online & set(self._sites.values())

    @contextmanager
    def run(self, series_id: int | None, *, name: str, digest: str) -> Iterator[OpenRun]:
        """Open a run of study ``name`` with ``digest``, in a new series (None) or as the next one of ``series_id``.

        Nodes keep a study's state per series. Inside the block ``flwr.app.Message`` can be made in any thread of this
        process; Flower keeps that identity per process, so that one run is open at a time.

        Raises:
            ProtocolError: another run is open, or the series is unknown.
        """
        if not self._run_open.acquire(blocking=False):
            raise ProtocolError("a run is open already: one coordinator runs one study at a time")
        try:
            state = self._state
            run_id = state.create_run(
                f"medfl/{name}",
                "1",
                digest,
                {},
                NOOP_FEDERATION_ID,
                None,
                NOOP_FLWR_AID,
                TaskType.SERVER_APP,
                series_id=series_id,
            )
            if not run_id:
                raise ProtocolError(f"run series {series_id} is unknown in {self._database()}: start a new one")
            run = state.get_run_info(run_ids=[run_id])[0]
            task_id = run.primary_task_id or 0
            if not (state.claim_task(task_id) and state.activate_task(task_id)):
                raise ProtocolError("the new run could not be started")
            grid = LinkGrid(state, run, self._orders, self._replies, self.settings.limits.max_body_bytes)
            context = Context(run_id, SUPERLINK_NODE_ID, {}, RecordDict(), {}, series_id=run.series_id)
            with _identity(run_id, task_id), self._heartbeat(task_id):
                outcome = SubStatus.FAILED
                try:
                    yield OpenRun(grid, context, run_id, run.series_id)
                    outcome = SubStatus.COMPLETED
                finally:
                    state.finish_task(task_id, outcome, "")
                    state.cleanup_run(run_id)
        finally:
            self._run_open.release()

    def _tls(self) -> ssl.SSLContext:
        settings = self.settings
        check_certificate(settings.certificate, authority=settings.authority)
        read_private(settings.key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(settings.authority)
            context.load_cert_chain(settings.certificate, settings.key)
        except ssl.SSLError:
            raise ConfigError(f"{settings.key}: does not belong to the certificate {settings.certificate}") from None
        return context

    def _listen(self) -> socket.socket:
        host, port = self.settings.host, self.settings.port
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family, backlog=256)
        except OSError as error:
            raise NetworkError(f"cannot listen on {host} port {port} ({error.strerror}): change host or port") from None
        self.port = listener.getsockname()[1]
        return listener

    def _database(self) -> Path:
        path = private_folder(self.settings.state_dir) / "fleet.db"
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, PRIVATE_FILE))  # SQLite gives its journals the same mode
        return path

    def _close_stale_runs(self) -> None:
        unfinished = [Status.PENDING, Status.STARTING, Status.RUNNING]
        for run in self._state.get_run_info(statuses=unfinished):
            self._state.finish_task(run.primary_task_id or 0, SubStatus.FAILED, "")
            self._state.cleanup_run(run.run_id)
            log.warning("closed a run that an earlier coordinator left open")

    def _node_of(self, site: str, key: bytes) -> int:
        if (node_id := self._state.get_node_id_by_public_key(key)) is not None:
            return node_id
        # Flower never lets a removed key in again; our roster decides, so the row is opened again.
        readmit = update(NodeRow).where(NodeRow.public_key == key).values(status="registered", unregistered_at=None)
        with self._state.session() as session:
            session.execute(readmit)
        if (node_id := self._state.get_node_id_by_public_key(key)) is not None:
            return node_id
        return self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0, name=site)

    @contextmanager
    def _heartbeat(self, task_id: int) -> Iterator[None]:
        done = threading.Event()

        def beat() -> None:
            while not done.wait(RUN_HEARTBEAT_S):
                if not self._state.acknowledge_task_heartbeat(task_id):
                    log.error("the run was closed: this machine was asleep for more than a minute")
                    return

        thread = threading.Thread(target=beat, name="run heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


@dataclass(slots=True)
class _Sent:
    """An instruction on its way, without content; ``reply`` once its answer began to arrive."""

    instruction: Message
    reply: str | None = None


class LinkGrid(Grid):
    """Flower's Grid directly on the link state: no HTTP, no polling interval, no second copy of a model.

    Errors that the link itself reports (node lost, reply incomplete) come as replies of the node concerned.
    """

    def __init__(self, state: SqlLinkState, run: Run, orders: Bell, replies: Bell, max_object_bytes: int) -> None:
        self._state = state
        self._run = run
        self._orders = orders
        self._replies = replies
        self._max_object_bytes = max_object_bytes
        self._sent: dict[str, _Sent] = {}
        self._last_created_at = 0.0

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
        """Hand over ``messages``; returns their ids, ``""`` for a node that is not enrolled.

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
        waiting = {message_id for message_id in self.push_messages(batch) if message_id}
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
        # Equal instructions would be one object: their times of creation differ by at least a microsecond.
        self._last_created_at = max(message.metadata.created_at, self._last_created_at + 1e-6)
        message.metadata.created_at = self._last_created_at
        run_id = self._run.run_id
        head = remove_content_from_message(message)
        message_id = message.object_id
        message.metadata.__dict__["_message_id"] = head.metadata.__dict__["_message_id"] = message_id
        session = self._state.start_session(run_id)
        stored, missing = self._state.store_message_and_object_tree(head, get_object_tree(message), session)
        if not stored:
            if self._state.get_run_info(run_ids=[run_id])[0].status.status == Status.FINISHED:
                raise ProtocolError("the run has been closed: start it again")
            return ""
        wanted = set(missing)
        for object_id, part in get_all_nested_objects(message).items():
            if object_id in wanted:
                content = part.deflate()
                if len(content) + 1024 > self._max_object_bytes:
                    raise ProtocolError(
                        f"a {type(part).__name__} of {len(content)} bytes is more than a node accepts in one piece: "
                        "put arrays into an ArrayRecord"
                    )
                self._state.store_object(run_id, session, object_id, content)
        self._sent[message_id] = _Sent(head)
        return message_id

    def _left_at(self, wanted: list[tuple[str, _Sent]]) -> dict[int, float]:
        """When each node last left, as a Unix time (0: never); infinity for a node that is not online now."""
        ids = {sent.instruction.metadata.dst_node_id for _, sent in wanted}
        left = dict.fromkeys(ids, inf)
        for info in self._state.get_node_info(node_ids=list(ids), statuses=["online"]):
            at = info.last_deactivated_at
            left[info.node_id] = datetime.fromisoformat(at).timestamp() if at else 0.0
        return left

    def _find_replies(self, wanted: list[tuple[str, _Sent]]) -> None:
        """Note which replies have begun to arrive.

        Flower's own ``get_message_res`` would replace the stored reply of a node that has left since by an error.
        """
        ids = [message_id for message_id, sent in wanted if sent.reply is None]
        query = select(ReplyRow.reply_to_message_id, ReplyRow.message_id).where(ReplyRow.reply_to_message_id.in_(ids))
        with self._state.session() as session:
            for message_id, reply in session.execute(query):
                self._sent[str(message_id)].reply = reply

    def _collect(self, sent: _Sent, left_at: Mapping[int, float]) -> Message | None:
        """The complete reply, an error in its place, or None while there is hope."""
        order = sent.instruction.metadata
        # A node that has left since then will not answer: it keeps nothing of what it was working on.
        unfinished: Message | None = None
        if left_at[order.dst_node_id] > order.created_at:
            unfinished = _error(sent, ErrorCode.NODE_UNAVAILABLE)
        elif order.created_at + order.ttl < time.time():
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
            message = inflate_object_from_contents(sent.reply, contents)
        except NoObjectInStoreError:  # its upload stopped for three minutes
            return _error(sent, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
        except Exception:  # whatever a node's bytes make Flower's parsers raise
            log.warning("node %d sent a reply that cannot be read", order.dst_node_id)
            return _error(sent, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
        if not isinstance(message, Message) or not _answers(message, order.message_id, order.dst_node_id):
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


class _NoLegacyServers:
    """Flower's lifespan would start gRPC servers and a task executor; ours starts nothing."""

    def __init__(self, *_: object) -> None: ...

    def startup(self) -> None:
        """Nothing."""

    def shutdown(self) -> None:
        """Nothing."""


def _superlink_config(settings: LinkSettings) -> SuperLinkLifespanConfig:
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=settings.host,
        port=settings.port,
        insecure=False,
        certificates=None,
        superexec_auth_secret=secrets.token_bytes(32),  # known to nobody: no one can take a task
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=FLWR_IN_MEMORY_DB_NAME,  # replaced by our own database and object store
        isolation="process",
        runtime_dependency_install=False,
    )


@contextmanager
def _identity(run_id: int, task_id: int) -> Iterator[None]:
    """Who makes messages in this process, as Flower's own task processes are told."""
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = task_id, run_id, SUPERLINK_NODE_ID
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


def _error(sent: _Sent, code: int) -> Message:
    return Message(Error(code), reply_to=sent.instruction)


def _answers(reply: Message, message_id: str, node_id: int) -> bool:
    metadata = reply.metadata
    return metadata.reply_to_message_id == message_id and metadata.src_node_id == node_id
