"""What a watchdog is told of a node and of a coordinator."""

from __future__ import annotations

import threading
import time

import pytest
from federation import Lab, echo, question, until
from flwr.app import Context, Message

import medfl.client.node


def test_a_node_is_alive_while_it_waits_and_while_it_works(lab: Lab) -> None:
    release, began = threading.Event(), threading.Event()

    def app(message: Message, context: Context) -> Message:
        began.set()
        release.wait(120)
        return echo(message, context)

    with lab.federation(app, sites=1) as (link, ids), link.run(None, name="study", digest="d" * 64) as run:
        (node,) = lab.nodes
        assert node.alive()
        run.grid.push_messages([question(ids["north"], ttl=120)])
        assert began.wait(60)
        assert node.alive()
        release.set()


def test_a_node_that_hangs_in_a_message_is_not(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medfl.client.node, "GRACE_S", 0.2)
    release, began = threading.Event(), threading.Event()

    def app(message: Message, context: Context) -> Message:
        began.set()
        release.wait(120)
        return echo(message, context)

    with lab.federation(app, sites=1) as (link, ids), link.run(None, name="study", digest="d" * 64) as run:
        (node,) = lab.nodes
        run.grid.push_messages([question(ids["north"], ttl=2.5)])
        assert began.wait(60)
        until(lambda: not node.alive())  # 2.5 s of deadline and 0.2 s of grace
        release.set()
        until(node.alive)


def test_a_node_whose_coordinator_is_away_is_alive(lab: Lab) -> None:
    running = lab.node("north", 1)  # nobody listens there
    until(lambda: bool(running.news))
    assert running.node.alive()


def test_a_link_is_alive_while_its_loop_turns(lab: Lab) -> None:
    link = lab.link()
    assert link.alive()
    link._server.on_tick = _stuck  # type: ignore[method-assign]
    link._server.ticked = time.monotonic() - 31  # as after half a minute in one request
    assert not link.alive()


async def _stuck(counter: int) -> bool:
    return False
