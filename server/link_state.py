"""The coordinator's memory of nodes, runs and messages, and the web application that nodes talk to: Flower's.

One of the four ``server/link*.py`` files, the only ones of the server that touch Flower's private modules.
Nodes and run series live in a database file, so that a restarted coordinator is the one the sites know. Payloads live
in memory: an interrupted run is closed at the next start, and no site's update touches the coordinator's disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import RLock

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from fastapi import FastAPI
from flwr.app import Message
from flwr.common.constant import Status
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.corestate.in_memory_corestate import InMemoryCoreState, ObjectPushSession
from flwr.supercore.error import http_error_translator
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.routers.health import router as health_router
from flwr.supercore.run import RunStatus
from flwr.supercore.state.schema.linkstate_models import MessageRes as ReplyRow
from flwr.supercore.state.schema.linkstate_models import Node as NodeRow
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from sqlalchemy import select, update
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import ASGIApp

UPLOAD_S = 3600
"""An upload of which no further piece has arrived for so long is forgotten.

Flower waits for three minutes, and four pieces of 5 MiB at a time take that long at 1 Mbit/s. Nobody waits here for an
upload that will not come: a site that has left and a deadline that is over are noticed in the grid.
"""
in_memory_corestate.OBJECT_PUSH_SESSION_TTL_SECONDS = UPLOAD_S  # type: ignore[attr-defined]


class PayloadStore(InMemoryObjectStore):
    """Flower's store of payloads, in which a message is registered whole or not at all.

    Flower lets go of the lock between a message's parts. Where two messages share a part, as one request to several
    sites does, the one that was done with took the part away from under the other, and the study failed.
    """

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """As Flower's, with the lock held from the first part to the last."""
        with self.lock_store:
            return super().preregister(run_id, object_tree)


class FleetState(SqlLinkState):
    """Flower's link state in a SQLite file, payloads in memory, without the bookkeeping that nobody reads here.

    Flower asks the database two or three times per request for what cannot have changed; on a small machine that was
    more than half of a round's time.
    """

    def __init__(self, database: Path) -> None:
        super().__init__(str(database), NoOpFederationManager(), PayloadStore())
        self.open_run: int | None = None  # the run that Link.run keeps open
        self._node_ids: dict[bytes, int] = {}
        self._object_push_sessions: dict[str, ObjectPushSession] = {}
        self._object_push_session_by_root: dict[str, str] = {}
        self._lock_object_push_sessions = RLock()
        self.initialize()

    def store_message_and_object_tree(
        self, message: Message, object_tree: ObjectTree, session_id: str
    ) -> tuple[bool, list[str]]:
        """As Flower's, with the sessions' lock taken before the database's, as where a session expires."""
        with self._lock_object_push_sessions:
            return super().store_message_and_object_tree(message, object_tree, session_id)

    def get_run_status(self, run_ids: set[int]) -> dict[int, RunStatus]:
        """The open run is running; the database knows about others."""
        if self.open_run is not None and run_ids == {self.open_run}:
            return {self.open_run: RunStatus(Status.RUNNING, "", "")}
        return super().get_run_status(run_ids)

    def get_node_id_by_public_key(self, public_key: bytes) -> int | None:
        """As Flower's, asked of the database once per key and roster."""
        node_id = self._node_ids.get(public_key)
        if node_id is None and (node_id := super().get_node_id_by_public_key(public_key)) is not None:
            self._node_ids[public_key] = node_id
        return node_id

    def delete_node(self, owner_aid: str, node_id: int) -> None:
        """As Flower's."""
        super().delete_node(owner_aid, node_id)
        self._node_ids.clear()

    def readmit(self, public_key: bytes) -> None:
        """Let a removed node in again under its old id. Flower never does; here the roster decides."""
        statement = update(NodeRow).where(NodeRow.public_key == public_key)
        with self.session() as session:
            session.execute(statement.values(status="registered", unregistered_at=None))

    def replies_to(self, message_ids: Sequence[str]) -> dict[str, str]:
        """Ids of the replies that have begun to arrive, by the instruction they answer.

        Flower's own ``get_message_res`` would replace the stored reply of a node that has left since by an error.
        """
        query = select(ReplyRow.reply_to_message_id, ReplyRow.message_id)
        with self.session() as session:
            rows = session.execute(query.where(ReplyRow.reply_to_message_id.in_(message_ids)))
            return {str(instruction): str(reply) for instruction, reply in rows}

    def _cleanup_expired_task_tokens(self) -> None:
        """Nothing: a run lasts until ``Link.run`` or this process ends.

        Flower closes a run that it has not heard of for a minute. A machine that was asleep, or paused for its backup,
        would then go on with a study that nobody answers any more.
        """

    def store_traffic(self, run_id: int, *, bytes_sent: int, bytes_recv: int) -> None:
        """Not counted."""

    def add_clientapp_runtime(self, run_id: int, runtime: float) -> None:
        """Not counted."""


# A push session lasts as long as the payload it brings, which is in memory: in SQL they were a fifth of a stage.
for _name in (
    *("start_session", "delete_sessions_in_run", "preregister_object_tree", "store_object", "get_object"),
    "_cleanup_push_session",
):
    setattr(FleetState, _name, getattr(InMemoryCoreState, _name))


def fleet_app(state: FleetState) -> ASGIApp:
    """Flower's fleet interface with its authentication, and nothing else of the SuperLink.

    The control and runtime interfaces, which let anyone register a node or start code, do not exist in this process.
    """
    middleware = [
        Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
        Middleware(ProtobufTranslationMiddleware),
        Middleware(NodeAuthMiddleware),
    ]
    app = FastAPI(openapi_url=None, middleware=middleware)
    app.include_router(health_router)
    app.include_router(fleet_router)
    factory = LinkStateFactory(state.database_url, state.federation_manager, ObjectStoreFactory())
    factory.state_instance = state
    app.state.linkstate_factory = factory
    app.state.enable_supernode_auth = True
    return app
