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
        self.heard = threading.Semaphore(0)  # released each time

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        assert (await receive())["body"] == b"question"
        self.asked += 1
        self.heard.release()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.news})


async def pull(poll: LongPoll, prefer: bytes, *, gone: asyncio.Event | None = None) -> tuple[bytes | None, float]:
    """The answer (None: nothing was sent) and how long it took."""
    sent: list[bytes] = []
    first = True

    async def receive() -> dict[str, object]:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": b"question", "more_body": False}
        await (gone or asyncio.Event()).wait()
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
    assert 0.9 < took < 30
    for prefer in (b"", b"respond-async", b"wait=-1", b"wait=9999"):
        asked = app.asked
        answer, took = asyncio.run(pull(poll, prefer))
        assert answer == b""
        assert app.asked == asked + 1  # once, and not held


def test_a_ring_from_another_thread_brings_the_news_at_once() -> None:
    orders = Bell()
    poll = LongPoll(app := Pulls(), orders=orders, replies=Bell())

    def bring() -> None:
        app.heard.acquire()
        orders.ring()  # for somebody else: asked again, still empty
        app.heard.acquire()
        app.news = b"news"
        orders.ring()

    threading.Thread(target=bring, daemon=True).start()
    answer, took = asyncio.run(pull(poll, b"wait=20"))
    assert (answer, app.asked) == (b"news", 3)
    assert took < 15


def test_a_node_that_hung_up_is_not_given_a_message() -> None:
    orders = Bell()
    poll = LongPoll(app := Pulls(), orders=orders, replies=Bell())

    async def scene() -> bytes | None:
        hung_up = asyncio.Event()
        waiting = asyncio.create_task(pull(poll, b"wait=20", gone=hung_up))
        while not app.asked:
            await asyncio.sleep(0.01)
        hung_up.set()
        for _ in range(20):  # the loop turns, and it hears of that
            await asyncio.sleep(0)
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
    bell.wait(seen, 60)
    asyncio.run(bell.wait_async(seen, 60))
    assert time.monotonic() - started < 30
