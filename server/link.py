"""The coordinator's end of the wire: Flower's fleet interface, embedded, behind the guard.

``server/link*.py`` are the only server files that touch Flower's private modules (flwr is pinned exactly, and
tests/server/test_link_contract.py says what is relied on). Used here: ``flwr.common.constant``,
``flwr.supercore.constant``, ``flwr.supercore.task_identity``.
In link_state.py: ``flwr.server.superlink.linkstate``, ``flwr.supercore.object_store``, ``flwr.supercore.state.schema``,
``flwr.supercore.corestate``, ``flwr.supercore.routers.health``, ``flwr.supercore.protobuf.translation``,
``flwr.supercore.error``, ``flwr.supercore.run``, ``flwr.superlink.federation``, ``flwr.superlink.routers.fleet``,
``flwr.proto``.
In link_inflate.py: ``flwr.supercore.inflatable``, ``flwr.supercore.constant``.
In link_grid.py: ``flwr.supercore.inflatable``, ``flwr.app.message.message.remove_content_from_message``,
``flwr.common.constant``, ``flwr.supercore.run``, ``flwr.proto``, and ``_message_id`` of message metadata.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import uvicorn
from flwr.app import Context, RecordDict
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, Status, SubStatus
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.task_identity import TaskIdentity
from sqlalchemy.exc import OperationalError

from medfl.server.check_in_desk import CheckInDesk, Desk
from medfl.server.connections import Doorway, Patience, allow_many_files, loop_with, protocol_with
from medfl.server.fleet_tls import FleetTls, TlsFiles
from medfl.server.guard import Guard, Limits
from medfl.server.link_grid import LinkGrid
from medfl.server.link_state import FleetState, fleet_app
from medfl.server.longpoll import Bell, LongPoll
from medfl.shared.errors import ConfigError, DiskRefusal, NetworkError, ProtocolError
from medfl.shared.files import PRIVATE_FILE, private_folder
from medfl.shared.keys import node_public_key
from medfl.shared.lock import only_one
from medfl.shared.memory import give_back_large_buffers

log = logging.getLogger("medfl.link")

_EXPECTED = (
    "was not pre-registered",
    "does not exist or has expired",
    "Run is finished",
    "timeout graceful shutdown exceeded",
)


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Where to listen, who we are, and what is let in."""

    host: str
    port: int  # 0 takes any free port: see Link.port
    tls: TlsFiles
    state_dir: Path
    limits: Limits = field(default_factory=Limits)
    patience: Patience = field(default_factory=Patience)
    max_connections: int = 4096


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
        DiskRefusal: the database cannot be written.
    """

    def __init__(self, settings: LinkSettings) -> None:
        self.settings = settings
        self.port = settings.port
        self.desk: Desk | None = None  # answers sites' check-ins
        self._sites: dict[str, int] = {}
        self._run_open = threading.Lock()

    def __enter__(self) -> Self:
        """Open the database, close what a dead coordinator left open, and serve."""
        _quieten()
        allow_many_files()
        give_back_large_buffers()
        self._tls = FleetTls(self.settings.tls)
        with ExitStack() as stack:
            stack.enter_context(only_one(self.settings.state_dir))
            listener = stack.enter_context(self._listen())
            self._orders, self._replies = Bell(), Bell()
            self._state = self._open_state()
            self._long_poll = LongPoll(fleet_app(self._state), orders=self._orders, replies=self._replies)
            config = uvicorn.Config(
                Guard(CheckInDesk(self._long_poll, lambda: self.desk), self.settings.limits),
                ssl_context_factory=lambda *_: self._tls.front,
                log_config=None,
                access_log=False,
                lifespan="on",
                ws="none",
                http=protocol_with(self.settings.patience, listener),
                proxy_headers=False,
                server_header=False,
                limit_concurrency=self.settings.max_connections,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=2,
            )
            self._server = _Server(config)
            self._thread = threading.Thread(target=self._serve, args=(listener,), name="link", daemon=True)
            self._thread.start()
            while not self._server.started:
                if not self._thread.is_alive():
                    raise NetworkError("the fleet interface did not start: see the log above")
                time.sleep(0.01)
            self._held = stack.pop_all()
        log.info("listening on %s port %d", self.settings.host, self.port)
        return self

    def __exit__(self, *_: object) -> None:
        """Let running requests end (2 s at most) and close the port."""
        self._long_poll.closing = True
        self._orders.ring()
        self._server.should_exit = True
        self._thread.join(10)
        self._held.close()

    def alive(self) -> bool:
        """Whether the loop that answers sites turns: what a watchdog asks, from another thread."""
        return self._thread.is_alive() and time.monotonic() - self._server.ticked < 30

    def reload_tls(self) -> None:
        """Let new connections see the certificate and the list of revoked ones that are on the disk now.

        Raises:
            ConfigError: they cannot be used; the ones before stay.
        """
        self._tls.reload()

    def _serve(self, listener: socket.socket) -> None:
        with asyncio.Runner(loop_factory=partial(loop_with, self.settings.patience)) as runner:
            runner.run(self._server.serve(sockets=[listener]))

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

    @property
    def sites(self) -> Mapping[str, int]:
        """Site name -> node id, of the sites enrolled now."""
        return dict(self._sites)

    def online(self) -> set[int]:
        """Ids of the enrolled nodes that have been heard of within two heartbeats."""
        return set(self.joined())

    def joined(self) -> dict[int, str]:
        """When each of them came online last."""
        enrolled = set(self._sites.values())
        nodes = self._state.get_node_info(statuses=["online"])
        return {node.node_id: str(node.last_activated_at) for node in nodes if node.node_id in enrolled}

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
                raise ProtocolError(f"run series {series_id} is unknown in {self.settings.state_dir}: start a new one")
            run = state.get_run_info(run_ids=[run_id])[0]
            task_id = run.primary_task_id or 0
            if not (state.claim_task(task_id) and state.activate_task(task_id)):
                raise ProtocolError("the new run could not be started")
            grid = LinkGrid(state, run, self._orders, self._replies, self.settings.limits.max_body_bytes)
            context = Context(run_id, SUPERLINK_NODE_ID, {}, RecordDict(), {}, series_id=run.series_id)
            state.open_run = run_id
            with _identity(run_id, task_id):
                outcome = SubStatus.FAILED
                try:
                    yield OpenRun(grid, context, run_id, run.series_id)
                    outcome = SubStatus.COMPLETED
                finally:
                    state.open_run = None
                    state.finish_task(task_id, outcome, "")
                    state.cleanup_run(run_id)
        finally:
            self._run_open.release()

    def _listen(self) -> Doorway:
        host, port = self.settings.host, self.settings.port
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family, backlog=256)
        except OSError as error:
            raise NetworkError(f"cannot listen on {host} port {port} ({error.strerror}): change host or port") from None
        self.port = listener.getsockname()[1]
        return Doorway(listener, self.settings.patience)

    def _open_state(self) -> FleetState:
        """The database, in which nothing is open that an earlier coordinator left.

        Raises:
            DiskRefusal: it cannot be written: the disk is full or read-only.
        """
        path = private_folder(self.settings.state_dir) / "fleet.db"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, PRIVATE_FILE))  # SQLite gives its journals the same mode
            state = FleetState(path)
            self._forget_the_past(state)
        except (OperationalError, OSError) as error:
            why = error.orig if isinstance(error, OperationalError) else error.strerror
            raise DiskRefusal(
                f"{path} cannot be written ({why}): free disk space or repair permissions. Nothing was lost"
            ) from None
        return state

    @staticmethod
    def _forget_the_past(state: FleetState) -> None:
        """Close the runs an earlier coordinator left open; nobody is online who has not come back."""
        unfinished = [Status.PENDING, Status.STARTING, Status.RUNNING]
        for run in state.get_run_info(statuses=unfinished):
            state.finish_task(run.primary_task_id or 0, SubStatus.FAILED, "")
            state.cleanup_run(run.run_id)
            log.warning("closed a run that an earlier coordinator left open")
        for node in state.get_node_info(statuses=["online"]):
            state.deactivate_node(node.node_id)

    def _node_of(self, site: str, key: bytes) -> int:
        if (node_id := self._state.get_node_id_by_public_key(key)) is not None:
            return node_id
        self._state.readmit(key)
        if (node_id := self._state.get_node_id_by_public_key(key)) is not None:
            return node_id
        return self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0, name=site)


class _Server(uvicorn.Server):
    """Remembers when its loop last turned: uvicorn ticks ten times a second."""

    ticked = 0.0

    async def on_tick(self, counter: int) -> bool:
        self.ticked = time.monotonic()
        return await super().on_tick(counter)


@contextmanager
def _identity(run_id: int, task_id: int) -> Iterator[None]:
    """Who makes messages in this process, as Flower's own task processes are told."""
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = task_id, run_id, SUPERLINK_NODE_ID
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


def _quieten() -> None:
    """Keep third parties' routine out of the log: flwr would format every request, alembic every table."""
    for name in ("flwr", "alembic", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        logger.addFilter(_not_expected)
    logging.getLogger("flwr").handlers.clear()  # its own console: one line per event, in our format, is enough


def _not_expected(record: logging.LogRecord) -> bool:
    """Drop what looks like an error and is not one.

    A reply is taken as soon as all its parts are there, even when an equal part came from another site first: the
    late part is then of no use. Answers come after their run is over. Connections stay open when the server closes.
    """
    text = record.getMessage()
    return not any(words in text for words in _EXPECTED)
