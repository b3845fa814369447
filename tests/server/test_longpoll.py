"""Long polling alone: held while empty, woken by the bell, let go on disconnect."""

from __future__ import annotations

import asyncio
import threading
import time

from medfl.server.longpoll import PULL, Bell, LongPoll


class Pulls:
    """An application whose answer is empty until ``news``; counts how often it was asked."""

    def __init__(self) -> None:
        self.news = b""
        self.asked = 0

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        assert (await receive())["body"] == b"question"
        self.asked += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.news})


async def pull(poll: LongPoll, prefer: bytes, *, gone_after_s: float = 30) -> tuple[bytes | None, float]:
    """The answer (None: nothing was sent) and how long it took."""
    sent: list[bytes] = []
    first = True

    async def receive() -> dict[str, object]:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": b"question", "more_body": False}
        await asyncio.sleep(gone_after_s)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])  # type: ignore[arg-type]

    started = time.monotonic()
    await poll({"type": "http", "path": PULL, "headers": [(b"prefer", prefer)]}, receive, send)  # type: ignore[arg-type]
    return (sent[0] if sent else None), time.monotonic() - started


def test_an_empty_answer_is_held_for_the_time_preferred_and_not_without_preference() -> None:
    poll = LongPoll(app := Pulls(), orders=Bell(), replies=Bell())
    answer, took = asyncio.run(pull(poll, b"wait=1"))
    assert (answer, app.asked) == (b"", 2)
    assert 0.9 < took < 1.5
    for prefer in (b"", b"respond-async", b"wait=-1", b"wait=9999"):
        answer, took = asyncio.run(pull(poll, prefer))
        assert answer == b""
        assert took < 0.5


def test_a_ring_from_another_thread_brings_the_news_at_once() -> None:
    orders = Bell()
    poll = LongPoll(app := Pulls(), orders=orders, replies=Bell())

    def bring() -> None:
        orders.ring()  # for somebody else: asked again, still empty
        time.sleep(0.1)
        app.news = b"news"
        orders.ring()

    timer = threading.Timer(0.2, bring)
    timer.start()
    answer, took = asyncio.run(pull(poll, b"wait=9"))
    assert (answer, app.asked) == (b"news", 3)
    assert took < 2


def test_a_node_that_hung_up_is_not_given_a_message() -> None:
    orders = Bell()
    poll = LongPoll(app := Pulls(), orders=orders, replies=Bell())

    async def scene() -> bytes | None:
        waiting = asyncio.create_task(pull(poll, b"wait=9", gone_after_s=0.1))
        await asyncio.sleep(0.3)
        app.news = b"news"
        orders.ring()
        return (await waiting)[0]

    assert asyncio.run(scene()) is None
    assert app.asked == 1


def test_a_ring_between_looking_and_waiting_is_not_missed() -> None:
    bell = Bell()
    seen = bell.count
    bell.ring()
    started = time.monotonic()
    bell.wait(seen, 5)
    asyncio.run(bell.wait_async(seen, 5))
    assert time.monotonic() - started < 1
