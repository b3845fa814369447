from __future__ import annotations

import time
from threading import Event, Thread

import numpy as np
from scripted import ScriptedGrid, ScriptedSite

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Message

from medfl.server.exchange import exchange
from medfl.shared.messages import Kind, ModelRequest


def requests(grid: ScriptedGrid) -> list[Message]:
    content = ModelRequest("0" * 64, 1, np.zeros(1, np.float32)).record()
    return [Message(content, dst_node_id=node, message_type=Kind.TRAIN.value) for node in grid.get_node_ids()]


def late(seconds: float) -> ScriptedSite:
    site = ScriptedSite()
    site.late_s = seconds
    return site


def names(grid: ScriptedGrid, replies: list[Message]) -> list[str]:
    return [grid.online()[reply.metadata.src_node_id] for reply in replies]


def test_replies_come_in_the_order_of_their_arrival() -> None:
    grid = ScriptedGrid({"slow": late(0.2), "quick": late(0.0), "middling": late(0.1)})
    replies = list(exchange(grid, requests(grid), deadline_s=5, stop=Event()))
    assert names(grid, replies) == ["quick", "middling", "slow"]


def test_a_reply_can_be_used_before_the_next_has_come() -> None:
    grid = ScriptedGrid({"quick": late(0.0), "never": late(99)})
    began = time.monotonic()
    first = next(iter(exchange(grid, requests(grid), deadline_s=5, stop=Event())))
    assert names(grid, [first]) == ["quick"]
    assert time.monotonic() - began < 1


def test_after_the_deadline_nobody_is_waited_for() -> None:
    grid = ScriptedGrid({"quick": late(0.0), "never": late(99)})
    began = time.monotonic()
    assert len(list(exchange(grid, requests(grid), deadline_s=0.2, stop=Event()))) == 1
    assert 0.2 <= time.monotonic() - began < 1


def test_the_time_to_live_of_a_message_is_the_deadline() -> None:
    grid = ScriptedGrid({"a": ScriptedSite()})
    list(exchange(grid, requests(grid), deadline_s=12.5, stop=Event()))
    assert grid.times_to_live == [12.5]


def test_stop_ends_the_wait_at_once() -> None:
    grid, stop = ScriptedGrid({"never": late(99)}), Event()
    Thread(target=lambda: (time.sleep(0.1), stop.set()), daemon=True).start()
    began = time.monotonic()
    assert list(exchange(grid, requests(grid), deadline_s=60, stop=stop)) == []
    assert time.monotonic() - began < 2


def test_no_messages_are_no_wait() -> None:
    assert list(exchange(ScriptedGrid({}), [], deadline_s=60, stop=Event())) == []
