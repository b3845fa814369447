"""What the link relies on in Flower's private modules. When Flower is upgraded, read what fails here first."""

from __future__ import annotations

import inspect
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import in_memory_object_store
from flwr.supercore.state.schema.linkstate_models import MessageRes, Node
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink import main as superlink
from flwr.superlink.routers.fleet.router import router

from medfl.server.link_state import UPLOAD_S, FleetState


def test_flowers_own_stack_has_no_layer_for_the_fleet_interface_that_ours_lacks() -> None:
    # Ours: http_error_translator, ProtobufTranslationMiddleware, NodeAuthMiddleware. The others are for the control
    # and runtime interfaces, which we do not serve, and for an event log, which we do not have.
    names = [layer.cls.__name__ for layer in superlink._get_middleware()]
    assert names == [
        "ControlSensitiveResponseMiddleware",
        "BaseHTTPMiddleware",
        "ControlAuthenticationMiddleware",
        "ControlLicenseMiddleware",
        "ProtobufTranslationMiddleware",
        "RuntimeTracingMiddleware",
        "ControlEventLogMiddleware",
        "NodeAuthMiddleware",
        "FleetEventLogMiddleware",
    ]


def test_the_fleet_interface_has_the_calls_that_it_had() -> None:
    paths = sorted(getattr(route, "path", "") for route in router.routes)
    assert paths == [
        f"/v1/fleet/{name}"
        for name in (
            "activate-node",
            "confirm-message-received",
            "deactivate-node",
            "get-fab",
            "get-run",
            "pull-messages",
            "pull-object",
            "push-messages",
            "push-object",
            "register-node",
            "send-node-heartbeat",
            "unregister-node",
        )
    ]


def test_an_upload_over_a_narrow_line_is_not_given_up_after_flowers_three_minutes() -> None:
    assert "OBJECT_PUSH_SESSION_TTL_SECONDS" in inspect.getsource(in_memory_corestate.InMemoryCoreState)
    assert in_memory_corestate.OBJECT_PUSH_SESSION_TTL_SECONDS == UPLOAD_S
    assert UPLOAD_S > 4 * 5 * 2**20 * 8 / 1e6 * 10  # ten times what four pieces take at 1 Mbit/s


def test_the_methods_that_we_override_exist_with_the_same_parameters() -> None:
    for name, ours in vars(FleetState).items():
        if inspect.isfunction(ours) and name not in ("__init__", "readmit", "replies_to"):
            theirs = getattr(SqlLinkState, name)
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name


def test_the_rows_that_we_read_and_write_have_their_columns() -> None:
    assert {"public_key", "status", "unregistered_at"} <= set(Node.__table__.columns.keys())
    assert {"message_id", "reply_to_message_id"} <= set(MessageRes.__table__.columns.keys())


def test_a_removed_node_is_readmitted_under_its_old_id(tmp_path: Path) -> None:
    state = FleetState(tmp_path / "fleet.db")
    node_id = state.create_node("aid", "name", b"key", 0, name="north")
    assert state.activate_node(node_id, 10)
    state.delete_node("aid", node_id)
    assert state.get_node_id_by_public_key(b"key") is None
    assert not state.activate_node(node_id, 10)
    state.readmit(b"key")
    assert state.get_node_id_by_public_key(b"key") == node_id
    assert state.activate_node(node_id, 10)


def test_what_is_on_its_way_is_kept_in_memory_and_never_in_the_database(tmp_path: Path) -> None:
    state = FleetState(tmp_path / "fleet.db")
    session = state.start_session(3)
    tree = ObjectTree(object_id="a" * 64)
    assert state.preregister_object_tree(tree, session) == ["a" * 64]
    assert not state.store_object(4, session, "a" * 64, b"of another run")
    with sqlite3.connect(tmp_path / "fleet.db") as database:
        tables = [
            name
            for (name,) in database.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE '%push_session%'"
            )
        ]
        assert tables
        assert [database.execute(f"SELECT COUNT(*) FROM {table}").fetchone() for table in tables] == [(0,)] * len(
            tables
        )
    assert state.delete_sessions_in_run(3) is None
    assert not state.store_object(3, session, "a" * 64, b"too late")


def test_the_lock_of_uploads_is_never_waited_for_inside_a_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An upload that expires takes the lock and then the database. Whoever took them the other way round would wait for
    # it, and it for them, until SQLite gives up.
    state = FleetState(tmp_path / "fleet.db")
    order = Order(state)
    monkeypatch.setattr(state, "session", order.session)
    monkeypatch.setattr(state, "_lock_object_push_sessions", order)
    monkeypatch.setattr(state, "store_message_ins", lambda message: "stored")  # in Flower's transaction
    session = state.start_session(3)
    tree = ObjectTree(object_id="a" * 64)
    assert state.store_message_and_object_tree(a_message(), tree, session) == (True, ["a" * 64])
    assert order.taken[-2:] == ["lock", "transaction"]
    state._object_push_sessions[session].expires_at -= timedelta(seconds=UPLOAD_S + 1)
    assert not state.store_object(3, session, "a" * 64, b"too late")  # which removes its message, too
    assert order.taken[-3:] == ["lock", "transaction", "transaction"]


def test_a_part_that_two_messages_share_is_not_taken_away_while_the_second_is_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FleetState(tmp_path / "fleet.db").object_store
    shared = ObjectTree(object_id="c" * 64)
    first, second = (ObjectTree(object_id=letter * 64, children=[shared]) for letter in "ab")
    store.preregister(3, first)
    done_with = threading.Thread(target=store.delete, args=[first.object_id])

    def slowly(tree: ObjectTree) -> Iterator[ObjectTree]:
        for number, node in enumerate(iterate_object_tree(tree)):
            if number == 1:  # the shared part was found, and the message that needs it comes next
                done_with.start()
                done_with.join(0.2)
            yield node

    monkeypatch.setattr(in_memory_object_store, "iterate_object_tree", slowly)
    assert store.preregister(3, second) == [shared.object_id, second.object_id]
    done_with.join()
    assert first.object_id not in store
    assert store.get_object_tree(second.object_id) == second


def a_message() -> Message:
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = 1, 2, 1
    try:
        return Message(RecordDict({"config": ConfigRecord({"text": "x"})}), 7, "query", ttl=5.0)
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


class Order:
    """Both of a link state's locks in one: notes which is taken, and fails where the database was the first."""

    def __init__(self, state: FleetState) -> None:
        self._lock, self._session, self._inside = state._lock_object_push_sessions, state.session, 0
        self.taken: list[str] = []

    def __enter__(self) -> None:
        if not self._lock._is_owned():  # type: ignore[attr-defined]
            assert not self._inside, "the lock of uploads is taken inside a transaction"
            self.taken.append("lock")
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @contextmanager
    def session(self) -> Iterator[Any]:
        self.taken.append("transaction")
        self._inside += 1
        with self._session() as session:
            yield session
        self._inside -= 1


def test_a_message_taken_apart_and_put_together_is_the_same() -> None:
    message = a_message()
    parts = {part: content.deflate() for part, content in get_all_nested_objects(message).items()}
    assert [node.object_id for node in iterate_object_tree(get_object_tree(message))] == list(parts)
    again = inflate_object_from_contents(message.object_id, parts)
    assert isinstance(again, Message)
    assert again.content["config"] == message.content["config"]
    assert (again.metadata.run_id, again.metadata.dst_node_id, again.metadata.ttl) == (2, 7, 5.0)


def test_only_the_adapters_import_flowers_private_modules() -> None:
    root = Path(__file__).parents[2]
    private = re.compile(
        r"^\s*(?:from|import) flwr(?!\.(?:app|clientapp|serverapp)(?:\.strategy)? import)", re.MULTILINE
    )
    folders = ("shared", "strategies", "server", "client")  # simulations have an adapter of their own
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    found = {str(path.relative_to(root)) for path in files if private.search(path.read_text())}
    ours = ("link", "link_grid", "link_inflate", "link_state")
    assert found == {"client/fleet.py", "client/connection.py", *(f"server/{name}.py" for name in ours)}
