"""Long polling for Flower's fleet interface: an idle node hears of a message at once, and asks every few seconds only.

Flower's nodes ask ``pull-messages`` again and again. A node that sends ``Prefer: wait=SECONDS`` (RFC 7240) has its
question held here while the answer is empty. The protocol is otherwise unchanged: other nodes notice nothing.
"""

from __future__ import annotations

import asyncio
import re
import threading
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_WAIT_S = 20.0
PULL = "/v1/fleet/pull-messages"
PUSHES = ("/v1/fleet/push-messages", "/v1/fleet/push-object")


class Bell:
    """Something happened: rung from any thread, waited for in a thread or in an event loop.

    Take :attr:`count` before looking for news, then wait with it: a ring in between is not missed.
    """

    def __init__(self) -> None:
        self.count = 0
        self._condition = threading.Condition()
        self._sleepers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def ring(self) -> None:
        """Wake everyone who waits."""
        with self._condition:
            self.count += 1
            self._condition.notify_all()
            for loop, event in self._sleepers:
                loop.call_soon_threadsafe(event.set)

    def wait(self, seen: int, timeout_s: float) -> None:
        """Return when ``count`` is no longer ``seen``, or after ``timeout_s``."""
        with self._condition:
            self._condition.wait_for(lambda: self.count != seen, timeout_s)

    async def wait_async(self, seen: int, timeout_s: float) -> None:
        """The same, in an event loop."""
        sleeper = (asyncio.get_running_loop(), asyncio.Event())
        with self._condition:
            if self.count != seen:
                return
            self._sleepers.add(sleeper)
        try:
            async with asyncio.timeout(timeout_s):
                await sleeper[1].wait()
        except TimeoutError:
            pass
        finally:
            with self._condition:
                self._sleepers.discard(sleeper)


class LongPoll:
    """ASGI application around Flower's: holds empty pulls until ``orders`` rings; rings ``replies`` after each push."""

    def __init__(self, app: ASGIApp, *, orders: Bell, replies: Bell) -> None:
        self._app = app
        self._orders = orders
        self._replies = replies
        self.closing = False  # set, and orders rung, to let go of everyone who waits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, whose body must arrive in one piece."""
        if scope["type"] == "http" and scope["path"] == PULL and (wait_s := _preferred_wait(scope)):
            await self._pull(scope, receive, send, wait_s)
            return
        await self._app(scope, receive, send)
        if scope["type"] == "http" and scope["path"] in PUSHES:
            self._replies.ring()

    async def _pull(self, scope: Scope, receive: Receive, send: Send, wait_s: float) -> None:
        request = await receive()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        gone = asyncio.create_task(_disconnect(receive))
        try:
            while True:
                seen = self._orders.count
                answer = await self._ask(scope, request)
                left = until - loop.time()
                if not _is_empty(answer) or left <= 0 or self.closing:
                    for message in answer:
                        await send(message)
                    return
                ring = asyncio.create_task(self._orders.wait_async(seen, left))
                await asyncio.wait({ring, gone}, return_when=asyncio.FIRST_COMPLETED)
                ring.cancel()
                if gone.done():  # asking again would hand a message to nobody
                    return
        finally:
            gone.cancel()

    async def _ask(self, scope: Scope, request: Message) -> list[Message]:
        answer: list[Message] = []
        pending = [request]

        async def receive() -> Message:
            if not pending:
                await asyncio.Event().wait()  # for ever: the answer comes first
            return pending.pop()

        async def send(message: Message) -> None:
            answer.append(message)

        await self._app({**scope, "state": dict(scope.get("state", {}))}, receive, send)
        return answer


def _is_empty(answer: list[Message]) -> bool:
    """Whether this is a good answer without messages: a PullMessagesResponse without fields has no bytes."""
    started = bool(answer) and answer[0].get("status") == HTTPStatus.OK
    return started and not any(message.get("body") for message in answer[1:])


def _preferred_wait(scope: Scope) -> float:
    """Seconds a node prefers to wait, 0 when it does not say."""
    for name, value in scope["headers"]:
        if name == b"prefer" and (match := re.fullmatch(rb"wait=([0-9]{1,3})", value)):
            return min(float(match[1]), MAX_WAIT_S)
    return 0.0


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
