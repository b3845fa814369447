"""The check-in's place on the fleet port: one more request there, answered beside Flower's own."""

from __future__ import annotations

from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from medfl.shared.checkin import PATH

Desk = Callable[[bytes], bytes | None]


class CheckInDesk:
    """ASGI application around another: answers POST ``/v1/fleet/check-in``, passes on everything else.

    ``desk`` is asked for each request who answers; it runs in a thread, and says None to strangers. The body must
    arrive in one piece, as the guard hands it on.
    """

    def __init__(self, app: ASGIApp, desk: Callable[[], Desk | None]) -> None:
        self._app = app
        self._desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] != PATH:
            await self._app(scope, receive, send)
            return
        desk = self._desk()
        if desk is None or scope["method"] != "POST":
            await _respond(send, 404, b"")
            return
        body = (await receive()).get("body", b"")
        answer = await run_in_threadpool(desk, body)
        await _respond(send, 403 if answer is None else 200, answer or b"")


async def _respond(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
