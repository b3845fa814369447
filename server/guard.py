"""What the hospitals' port lets in: ``/v1/fleet/*`` and ``/health`` only, bodies up to a cap, and no slow ones.

Flower's SuperLink application serves its control and runtime interfaces on the same port, without authentication;
behind this guard they do not exist. A body is read here, counted as it streams in, and handed on whole: Flower would
buffer it anyway, but without any limit and before it knows who is asking.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one request."""

    max_body_bytes: int = 16 * 1024 * 1024  # arrays travel in pieces of 5 MiB
    max_pause_s: float = 20.0  # between two pieces of a body
    max_body_s: float = 300.0  # for a whole body; 16 MiB at 1 Mbit/s take 134 s


class Guard:
    """ASGI application in front of another: refuses by path, size and slowness; passes the rest on unchanged."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        # Anything else (websocket) is not answered: the server then refuses the handshake.

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if not (path.startswith("/v1/fleet/") or path == "/health"):
            await _refuse(send, HTTPStatus.NOT_FOUND)
            return
        length = _content_length(scope)
        if length is None:
            await _refuse(send, HTTPStatus.BAD_REQUEST)
            return
        if length > self._limits.max_body_bytes:
            await _refuse(send, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        try:
            async with asyncio.timeout(self._limits.max_body_s):
                body = await self._body(receive)
        except TimeoutError:
            await _refuse(send, HTTPStatus.REQUEST_TIMEOUT)
            return
        if body is None:
            return
        if len(body) > self._limits.max_body_bytes:
            await _refuse(send, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body, or its beginning when it exceeds the cap, or None when the other side went away."""
        pieces: list[bytes] = []
        size, more = 0, True
        while more and size <= self._limits.max_body_bytes:
            async with asyncio.timeout(self._limits.max_pause_s):
                message = await receive()
            if message["type"] != "http.request":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            more = message.get("more_body", False)
        return b"".join(pieces)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives ``body`` once and then waits for the disconnect."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _refuse(send: Send, status: HTTPStatus) -> None:
    # The rest of a refused body is not read: the connection cannot be used again.
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _content_length(scope: Scope) -> int | None:
    """The announced length, 0 when there is none (chunked), None when it is not a number."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else None
    return 0
