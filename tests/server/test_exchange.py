from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from threading import Event, Thread

import numpy as np
import pytest
from scripted import CUT_OFF, Answer, ScriptedGrid, ScriptedSite

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Message

from medfl.server import pace
from medfl.server.exchange import Exchange
from medfl.server.pace import Pace
from medfl.shared.messages import Kind, ModelRequest


def requests(grid: ScriptedGrid) -> list[Message]:
    content = ModelRequest("0" * 64, 1, np.zeros(1, np.float32)).record()
    return [Message(content, dst_node_id=node, message_type=Kind.TRAIN.value) for node in grid.get_node_ids()]


def late(seconds: float) -> ScriptedSite:
    site = ScriptedSite()
    site.late_s = seconds
    return site


def exchange(grid: ScriptedGrid, messages: list[Message], *, deadline_s: float, stop: Event) -> Iterator[Message]:
    return Exchange(grid, Pace(deadline_s), "training", online=grid.online, stop=stop).run(messages)


def names(grid: ScriptedGrid, replies: list[Message]) -> list[str]:
    return [grid.online()[reply.metadata.src_node_id] for reply in replies]


def test_replies_come_in_the_order_of_their_arrival() -> None:
    grid = ScriptedGrid({"slow": late(0.2), "quick": late(0.0), "middling": late(0.1)})
    replies = list(exchange(grid, requests(grid), deadline_s=60, stop=Event()))
    assert names(grid, replies) == ["quick", "middling", "slow"]


def test_a_reply_can_be_used_before_the_next_has_come() -> None:
    grid = ScriptedGrid({"quick": late(0.0), "never": late(99)})
    began = time.monotonic()
    first = next(iter(exchange(grid, requests(grid), deadline_s=60, stop=Event())))
    assert names(grid, [first]) == ["quick"]
    assert time.monotonic() - began < 30


def test_after_the_deadline_nobody_is_waited_for() -> None:
    grid = ScriptedGrid({"quick": late(0.0), "never": late(99)})
    began = time.monotonic()
    assert len(list(exchange(grid, requests(grid), deadline_s=0.2, stop=Event()))) == 1
    assert 0.2 <= time.monotonic() - began < 60


def test_the_time_to_live_of_a_message_is_the_deadline() -> None:
    grid = ScriptedGrid({"a": ScriptedSite()})
    list(exchange(grid, requests(grid), deadline_s=12.5, stop=Event()))
    assert grid.times_to_live == [12.5]


def test_stop_ends_the_wait_at_once() -> None:
    grid, stop = ScriptedGrid({"never": late(99)}), Event()
    Thread(target=lambda: (time.sleep(0.1), stop.set()), daemon=True).start()
    began = time.monotonic()
    assert list(exchange(grid, requests(grid), deadline_s=60, stop=stop)) == []
    assert time.monotonic() - began < 30


def test_no_messages_are_no_wait() -> None:
    assert list(exchange(ScriptedGrid({}), [], deadline_s=60, stop=Event())) == []


class Flaky(ScriptedSite):
    """Cut off with the request in hand, as often as said; then it answers."""

    def __init__(self, times: int, then: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.times, self._then = times, then

    def train(self, request: ModelRequest) -> Answer:
        self.times -= 1
        if self.times >= 0:
            self._then()
            return CUT_OFF
        return super().train(request)


def words(grid: ScriptedGrid, needed: int, deadline_s: float = 60) -> tuple[list[str], float]:
    """Who answered, where ``needed`` answers are waited for, and how long it took."""
    began = time.monotonic()
    answered: list[str] = []

    def enough(may_come: int) -> bool:
        return not len(answered) < needed <= len(answered) + may_come

    run = Exchange(grid, Pace(deadline_s), "training", online=grid.online, stop=Event())
    for reply in run.run(requests(grid), enough=enough):
        if reply.has_content():
            answered += names(grid, [reply])
    return answered, time.monotonic() - began


def test_a_site_that_was_cut_off_and_is_back_is_asked_again() -> None:
    grid = ScriptedGrid({"a": ScriptedSite(), "killed": Flaky(2)})
    assert words(grid, 2)[0] == ["a", "killed"]
    assert grid.asked.count(("killed", Kind.TRAIN.value)) == 3


def test_a_site_that_is_killed_by_the_request_is_not_asked_for_ever() -> None:
    grid = ScriptedGrid({"a": ScriptedSite(), "killed": Flaky(99)})
    answered, seconds = words(grid, 2)
    assert (answered, grid.asked.count(("killed", Kind.TRAIN.value))) == (["a"], 5)
    assert seconds < 30


def test_a_site_that_stays_away_is_waited_for_only_where_it_is_needed() -> None:
    def grid() -> ScriptedGrid:
        made = ScriptedGrid({"a": ScriptedSite(), "b": ScriptedSite()})
        made._sites = {**made._sites, "b": Flaky(1, lambda: made.offline.add("b"))}
        return made

    assert words(grid(), 1)[1] < 15  # there are enough
    assert words(grid(), 3)[1] < 15  # there cannot be enough
    assert 0.9 < words(grid(), 2, deadline_s=1.0)[1] < 15


def test_a_site_is_waited_for_as_long_as_it_took_before_and_not_for_the_whole_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace, "_AT_LEAST_S", 0.1)
    grid, known = ScriptedGrid({"quick": late(0.0), "hung": late(99)}), Pace(60)
    for node in grid.online():
        known.took("training", node, 0.04)
    run, began = Exchange(grid, known, "training", online=grid.online, stop=Event()), time.monotonic()
    assert names(grid, list(run.run(requests(grid)))) == ["quick"]
    assert time.monotonic() - began < 30  # of a deadline of 60
    assert [grid.online()[node] for node in run.late] == ["hung"]
    assert set(grid.times_to_live) == {0.2}
