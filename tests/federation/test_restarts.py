"""Kills and restarts on either side."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from federation import Lab, question, text_of, until
from flwr.supercore.state.schema.corestate_models import Task as TaskModel
from sqlalchemy import update

import medfl.client.node
from medfl.server.link import Link, OpenRun
from medfl.shared.errors import ConfigError
from medfl.simulations.demo import free_port

SITE = Path(__file__).parents[1] / "support" / "site_process.py"
DIGEST = "d" * 64
HOUR = datetime.timedelta(hours=1)


@pytest.fixture
def start(lab: Lab) -> Iterator[Callable[[Link], subprocess.Popen[bytes]]]:
    """Start north as a process."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(link: Link) -> subprocess.Popen[bytes]:
        folder, state = lab.consortium.authority.parent, lab.folder / "north"
        command = [sys.executable, SITE, str(folder), "north", str(link.port), str(state)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SITE.parent)}
        processes.append(subprocess.Popen(command, env=environment))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def ask(run: OpenRun, node_id: int, text: str = "", timeout: float = 60) -> str:
    (reply,) = run.grid.send_and_receive([question(node_id, text)], timeout=timeout)
    return text_of(reply) if reply.has_content() else f"error {reply.error.code}"


def test_a_killed_node_is_back_in_seconds_with_its_state_and_what_it_had_in_hand_is_reported_lost(
    lab: Lab, start: Callable[[Link], subprocess.Popen[bytes]]
) -> None:
    link = lab.link(sites=1)
    node_id = link.enrol(lab.roster(1))["north"]
    process = start(link)
    until(lambda: link.online() == {node_id})
    with link.run(None, name="study", digest=DIGEST) as run:
        assert [ask(run, node_id), ask(run, node_id)] == ["1", "2"]
        replies = run.grid.stream([question(node_id, "wait")], timeout=60)
        until((lab.folder / "north" / "waits").exists)  # it has the message now
        process.kill()
        process.wait()
        process = start(link)
        (lost,) = replies
        assert lost.error.code == 5
        assert lost.metadata.src_node_id == node_id
        until(lambda: link.online() == {node_id})  # on a busy machine the loss is noticed before it is back
        assert ask(run, node_id) == "3"
    process.terminate()
    assert process.wait(60) == 0
    assert link.online() == set()
    assert not (lab.folder / "north" / "node_id").exists()
    assert (lab.folder / "north" / f"series-{run.series_id}.state").stat().st_mode & 0o777 == 0o600


def test_nodes_reconnect_by_themselves_to_a_restarted_coordinator_and_its_series_goes_on(
    lab: Lab, start: Callable[[Link], subprocess.Popen[bytes]]
) -> None:
    with Link(lab.link_settings(port=free_port())) as link:  # one that no connection of ours is dialled from meanwhile
        ids = link.enrol(lab.roster(2))
        lab.node("south", link.port)
        start(link)
        until(lambda: link.online() == set(ids.values()))
        with link.run(None, name="study", digest=DIGEST) as run:
            assert ask(run, ids["north"]) == "1"
    with Link(lab.link_settings(port=link.port)) as link:
        assert link.enrol(lab.roster(2)) == ids
        with link.run(run.series_id, name="study", digest=DIGEST) as again:
            until(lambda: link.online() == set(ids.values()))
            assert ask(again, ids["north"]) == "2"
            assert ask(again, ids["south"], "hi") == "hi"


def test_a_run_left_open_by_a_killed_coordinator_is_closed_at_the_next_start(lab: Lab) -> None:
    code = (
        "import os, sys; from federation import *; from medfl.shared.certificates import *\n"
        "files = [Path(sys.argv[1]) / f for f in ('authority.pem', 'coordinator.pem', 'coordinator.key')]\n"
        "link = Link(LinkSettings('127.0.0.1', 0, TlsFiles(*files), Path(sys.argv[2]))).__enter__()\n"
        "link.run(None, name='study', digest='d' * 64).__enter__(); os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": str(SITE.parent)}
    folder, state = lab.consortium.authority.parent, lab.folder / "server"
    command = [sys.executable, "-c", code, str(folder), str(state)]
    assert subprocess.run(command, env=environment, check=False).returncode == -9
    link = lab.link()
    runs = link._state.get_run_info()
    assert [run.status.status for run in runs] == ["finished"]
    assert {path.stat().st_mode & 0o777 for path in state.iterdir()} == {0o600}


def test_a_run_outlives_an_hour_in_which_the_machine_was_asleep(lab: Lab) -> None:
    with lab.federation(sites=1) as (link, ids), link.run(None, name="study", digest=DIGEST) as run:
        assert ask(run, ids["north"], "before") == "before"
        an_hour_ago = update(TaskModel).values(active_until=datetime.datetime.now(datetime.UTC) - HOUR)
        with link._state.session() as session:
            session.execute(an_hour_ago)
        link._state._cleanup_expired_task_tokens()  # as Flower does with every change of a run
        link._state.open_run = None  # what the database says, and not what the link remembers
        assert link._state.get_run_status({run.run_id})[run.run_id].status == "running"
        assert ask(run, ids["north"], "after") == "after"


def test_a_node_that_is_stopped_lets_its_heartbeat_end_first(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medfl.client.node, "HEARTBEAT_S", 0.2)
    began, ended = threading.Event(), threading.Event()

    def slow(fleet: object) -> None:
        if threading.current_thread().name == "heartbeat":
            began.set()
            time.sleep(0.3)
            ended.set()

    running = lab.node("north", lab.link(sites=1).port)
    running.node._check_in = slow
    assert began.wait(60)
    running.stop()
    assert ended.is_set()


def test_a_state_folder_is_used_by_one_process_at_a_time(lab: Lab) -> None:
    link = lab.link()
    with pytest.raises(ConfigError, match="in use"), Link(lab.link_settings()):
        pass
    first = lab.node("north", link.port)
    until(lambda: bool(first.news))
    from medfl.client.node import Node

    with pytest.raises(ConfigError, match="in use"):
        Node(lab.node_settings("north", link.port), first.node._app, first.node._gate).run()


def test_a_damaged_state_is_reported_and_not_overwritten(lab: Lab) -> None:
    with lab.federation(sites=1) as (link, ids), link.run(None, name="study", digest=DIGEST) as run:
        assert ask(run, ids["north"], "hi") == "hi"
        path = lab.folder / "north" / f"series-{run.series_id}.state"
        path.write_bytes(b"damaged")
        (reply,) = run.grid.send_and_receive([question(ids["north"])], timeout=60)
        assert reply.error.reason == "data"
        assert path.read_bytes() == b"damaged"
