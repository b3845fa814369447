"""Bounds on connections: how long and how many handshakes, how long a request's head, how many for one certificate.

The guard bounds requests once they are there. Before that a stranger can only hold handshakes open, and a member only
connections without a request: neither for long, and neither so many that the others find no place. A handshake costs
300 KiB of memory, so a stranger's number of them is bounded before any of it is spent.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections import Counter
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_FILES = 65_536


@dataclass(frozen=True, slots=True)
class Patience:
    """What one connection may take."""

    handshake_s: float = 15.0
    handshakes: int = 1024  # under way at a time, of all addresses
    handshakes_of_one: int = 64  # of one address
    head_s: float = 20.0  # from the connection, or the first byte of a later request, to the end of the head
    per_certificate: int = 16  # open at a time; a site's node uses two or three


class BoundedLoop(asyncio.SelectorEventLoop):
    """An event loop whose servers do not wait long for a TLS handshake."""

    handshake_s = Patience().handshake_s

    async def create_server(self, *args: Any, **options: Any) -> asyncio.Server:
        """As any loop does."""
        if options.get("ssl") is not None:
            options.setdefault("ssl_handshake_timeout", self.handshake_s)
        return await super().create_server(*args, **options)


class Doorway(socket.socket):
    """A listening socket that closes at once what comes while too many handshakes are under way."""

    def __init__(self, listener: socket.socket, patience: Patience) -> None:
        """Takes ``listener`` over."""
        super().__init__(listener.family, listener.type, listener.proto, fileno=listener.detach())
        self._patience = patience
        self._waiting: dict[int, str] = {}  # by file descriptor: the address

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection there is room for. Raises BlockingIOError when none is left."""
        while True:
            descriptor, address = self._accept()  # type: ignore[attr-defined]
            connection = _Visitor(self, descriptor)
            if self._has_room_for(str(address[0])):
                self._waiting[descriptor] = str(address[0])
                return connection, address
            connection.close()

    def let_in(self, descriptor: int) -> None:
        """Its handshake is over, one way or the other."""
        self._waiting.pop(descriptor, None)

    def _has_room_for(self, address: str) -> bool:
        of_one = sum(other == address for other in self._waiting.values())
        return len(self._waiting) < self._patience.handshakes and of_one < self._patience.handshakes_of_one


class _Visitor(socket.socket):
    def __init__(self, doorway: Doorway, descriptor: int) -> None:
        super().__init__(doorway.family, doorway.type, doorway.proto, fileno=descriptor)
        self._doorway = doorway

    def close(self) -> None:
        self._doorway.let_in(self.fileno())
        super().close()


def loop_with(patience: Patience) -> asyncio.AbstractEventLoop:
    """A new loop for servers with ``patience``."""
    loop = BoundedLoop()
    loop.handshake_s = patience.handshake_s
    return loop


def protocol_with(patience: Patience, doorway: Doorway) -> type[asyncio.Protocol]:
    """Uvicorn's HTTP/1.1 protocol with ``patience``; one class for each server, which counts its connections."""
    open_connections: Counter[str] = Counter()

    class BoundedProtocol(H11Protocol):
        _holder = ""
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            doorway.let_in(transport.get_extra_info("socket").fileno())
            self._holder = _certificate_of(transport)
            open_connections[self._holder] += 1
            if open_connections[self._holder] > patience.per_certificate:
                transport.abort()
                return
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            open_connections[self._holder] -= 1
            if not open_connections[self._holder]:
                del open_connections[self._holder]
            self._head_is_there()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                self._await_head()
            else:
                self._head_is_there()

        def _await_head(self) -> None:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(patience.head_s, self.transport.abort)

        def _head_is_there(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return BoundedProtocol


def allow_many_files() -> None:
    """Let this process have as many files and connections open as the system allows it, up to :data:`MOST_FILES`.

    The usual 1,024 are soon taken by strangers who open connections; then not even a checkpoint could be written.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _certificate_of(transport: asyncio.Transport) -> str:
    """Serial number of the client's certificate; without TLS nobody is told apart."""
    tls = transport.get_extra_info("ssl_object")
    certificate = tls.getpeercert() if tls is not None else None
    return str(certificate.get("serialNumber", "")) if certificate else ""
