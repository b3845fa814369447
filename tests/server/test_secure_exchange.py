"""How the phases of a secure sum travel: few uploads at a time, a deadline for each site, and only its own answers."""

from __future__ import annotations

import time
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import Answer, ScriptedGrid, ScriptedSite

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Error, Message

from medfl.server.secagg.outcome import SumVoid
from medfl.server.secure_exchange import GridExchange
from medfl.shared.errors import Code
from medfl.shared.messages import Failure, SecureReply
from medfl.shared.secagg.exchange import Phase, PhaseReply, PhaseRequest, SiteRefusal

MEGABYTE = 1024 * 1024


class Answering(ScriptedSite):
    """Answers every phase with ``answer``."""

    def __init__(self, answer: Answer = None) -> None:
        super().__init__()
        self.answer = SecureReply(PhaseReply(b"mine")).record() if answer is None else answer

    def __call__(self, message: Message) -> Answer:
        return self.answer


class Counting(ScriptedGrid):
    """Knows how many requests were ever open at once."""

    def __init__(self, sites: int) -> None:
        super().__init__({f"site-{number}": Answering() for number in range(sites)})
        self.open, self.most = 0, 0

    def push_messages(self, messages: Any) -> Any:
        identities = list(super().push_messages(messages))
        self.open += len(identities)
        self.most = max(self.most, self.open)
        return identities

    def pull_messages(self, message_ids: Any) -> Any:
        found = list(super().pull_messages(message_ids))
        self.open -= len(found)
        return found


def exchange(grid: ScriptedGrid, *, deadline_s: float = 30.0, **sizes: int) -> GridExchange:
    stages: Any = SimpleNamespace(grid=grid, stop=Event())
    nodes = {number: node for number, node in enumerate(grid.get_node_ids(), start=1)}
    return GridExchange(stages, nodes, deadline_s=deadline_s, **sizes)


def asked(count: int) -> dict[int, PhaseRequest]:
    return {site: PhaseRequest(b"tell") for site in range(1, count + 1)}


@pytest.mark.parametrize(
    ("phase", "vector_bytes", "at_once"),
    [
        (Phase.ADVERTISE_KEYS, 4 * MEGABYTE, 10),
        (Phase.MASKED_INPUT, 4 * MEGABYTE, 4),
        (Phase.MASKED_INPUT, 120 * MEGABYTE, 2),  # two of 120 MiB are less than 256 MiB, three are more
        (Phase.MASKED_INPUT, 1000 * MEGABYTE, 1),
    ],
)
def test_masked_vectors_are_let_in_a_few_at_a_time(phase: Phase, vector_bytes: int, at_once: int) -> None:
    grid = Counting(10)
    replies = dict(exchange(grid, vector_bytes=vector_bytes)(phase, asked(10)))
    assert replies == dict.fromkeys(range(1, 11), PhaseReply(b"mine"))
    assert grid.most == at_once


@pytest.mark.parametrize("phase", list(Phase))
def test_every_phase_ends_at_its_deadline_without_those_that_are_silent(phase: Phase) -> None:
    grid = ScriptedGrid({"a": Answering(), "b": Answering([]), "c": Answering()})
    began = time.monotonic()
    replies = dict(exchange(grid, deadline_s=0.3)(phase, asked(3)))
    assert replies.keys() == {1, 3}
    assert 0.3 <= time.monotonic() - began < 10
    assert set(grid.times_to_live) == {0.3}


def test_an_answer_after_the_deadline_is_never_seen() -> None:
    late = Answering()
    late.late_s = 0.5
    grid = ScriptedGrid({"a": late})
    assert dict(exchange(grid, deadline_s=0.1)(Phase.UNMASK, asked(1))) == {}


def test_a_stop_ends_the_phase_at_once_as_a_stop_and_blames_no_site() -> None:
    carried = exchange(ScriptedGrid({"a": Answering(), "b": Answering([])}), deadline_s=60)
    began, heard = time.monotonic(), []
    with pytest.raises(SumVoid, match="the study is being stopped") as void:  # noqa: PT012 - what came before counts
        for site, _ in carried(Phase.UNMASK, asked(2)):
            heard.append(site)
            carried._stages.stop.set()
    assert time.monotonic() - began < 10
    assert heard == [1]
    assert (void.value.confirmed, void.value.refusals) == (False, {})


def test_a_stop_after_the_last_answer_changes_nothing() -> None:
    carried = exchange(ScriptedGrid({"a": Answering()}), deadline_s=60)
    for site, _ in carried(Phase.UNMASK, asked(1)):
        assert site == 1
        carried._stages.stop.set()


def test_a_refusal_keeps_its_code_and_reason_and_what_is_no_answer_is_told_apart() -> None:
    grid = ScriptedGrid(
        {
            "a": Answering(Failure(Code.REFUSED, "cohort too small").record()),
            "b": Answering([Error(3, "why it failed")]),
            "c": Answering(Failure(Code.DATA, "journal").record()),
        }
    )
    replies = dict(exchange(grid)(Phase.ADVERTISE_KEYS, asked(3)))
    assert replies == {
        1: SiteRefusal(Code.REFUSED, "cohort too small"),
        2: SiteRefusal(Code.PROTOCOL, "unavailable"),
        3: SiteRefusal(Code.DATA, "journal"),
    }


def test_an_answer_of_another_node_is_not_taken_for_the_sites() -> None:
    grid = ScriptedGrid({"a": Answering(), "b": Answering()})
    push = grid.push_messages

    def exchanged(messages: Any) -> Any:
        identities = push(messages)
        for _, reply in grid._ready:
            reply.metadata.__dict__["_src_node_id"] = 2  # b's answers come from a's node too
        return identities

    grid.push_messages = exchanged  # type: ignore[method-assign]
    assert dict(exchange(grid, deadline_s=0.2)(Phase.UNMASK, asked(2))) == {1: PhaseReply(b"mine")}


def test_sites_without_a_node_are_not_asked() -> None:
    grid = ScriptedGrid({"a": Answering()})
    assert dict(exchange(grid)(Phase.UNMASK, asked(3))) == {1: PhaseReply(b"mine")}
    assert len(grid.asked) == 1
