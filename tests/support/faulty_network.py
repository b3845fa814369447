"""A TCP proxy that spoils the way between a site and its coordinator: slow, narrow, lossy, cut, reset in the middle.

It stands where ``tc netem`` would on machines whose kernel has it. Loss is shown as what TCP makes of it: the stream
stops for a retransmission's time at each lost segment, longer each time it is lost again.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

Pair = tuple[socket.socket, socket.socket]
"""Both ends of one connection: the site's, the coordinator's."""

_SEGMENT = 1400  # bytes, about what one packet carries


@dataclass
class Faults:
    """What is wrong with the way, each direction for itself. May be changed while it is in use."""

    latency_s: float = 0.0  # one way
    bytes_per_s: float = float("inf")
    loss: float = 0.0  # of segments
    retransmission_s: float = 0.2  # until a lost segment is sent again; twice as long if it is lost again
    cut: bool = False  # nothing passes and nobody is let in
    reset_after: int | None = None  # bytes from site to coordinator; then the connection is reset, once
    seed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


class FaultyNetwork:
    """``with FaultyNetwork(port, Faults(...)) as network:`` the coordinator at ``port`` is reached at ``network.port``.

    ``sent`` counts the bytes that went from sites to the coordinator, ``resets`` how often a connection was broken.
    """

    def __init__(self, port: int, faults: Faults) -> None:
        self._target = port
        self.faults = faults
        self.sent = 0
        self.resets = 0
        self._draw = random.Random(faults.seed)
        self._links: set[Pair] = set()
        self._line = {True: 0.0, False: 0.0}  # when each direction's shared line is free again

    def __enter__(self) -> FaultyNetwork:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.break_all()

    def move_to(self, port: int) -> None:
        """From now on connections lead to another port; those that exist are broken."""
        self._target = port
        self.break_all()

    def break_all(self) -> None:
        """Reset every connection."""
        for pair in list(self._links):
            self._break(pair)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self.faults.cut:
                    raise OSError
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                _reset(near)
                continue
            pair = near, far
            self._links.add(pair)
            for source, sink, up in ((near, far, True), (far, near, False)):
                sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._carry, args=(pair, source, sink, up), daemon=True).start()

    def _carry(self, pair: Pair, source: socket.socket, sink: socket.socket, up: bool) -> None:
        """Copy one direction. What was read waits its latency in a queue, so that latency does not narrow the line."""
        waiting: list[tuple[float, bytes]] = []
        ready = threading.Condition()
        closed = threading.Event()

        def deliver() -> None:
            while True:
                with ready:
                    while not waiting:
                        if closed.is_set():
                            with _quietly():
                                sink.shutdown(socket.SHUT_WR)
                            return
                        ready.wait(0.2)
                    due, data = waiting.pop(0)
                time.sleep(max(0.0, due - time.monotonic()))
                try:
                    sink.sendall(data)
                except OSError:
                    self._break(pair)
                    return

        threading.Thread(target=deliver, daemon=True).start()
        try:
            while data := source.recv(_SEGMENT if self.faults.loss else 65536):
                if self.faults.cut:
                    break
                if up and self._resets(len(data)):
                    return self._break(pair)
                due = self._pass(len(data), up) + self.faults.latency_s
                with ready:
                    waiting.append((due, data))
                    ready.notify()
            if self.faults.cut:
                self._break(pair)
        except OSError:
            self._break(pair)
        finally:
            closed.set()
        return None

    def _resets(self, size: int) -> bool:
        with self.faults._lock:
            self.sent += size
            if self.faults.reset_after is None or self.sent < self.faults.reset_after:
                return False
            self.faults.reset_after = None
            self.resets += 1
            return True

    def _pass(self, size: int, up: bool) -> float:
        """Wait until the line has taken ``size`` bytes; returns when that is."""
        faults = self.faults
        with faults._lock:
            start = max(self._line[up], time.monotonic())
            stall, again = 0.0, faults.retransmission_s
            while faults.loss and self._draw.random() < faults.loss:
                stall += again
                again *= 2
            self._line[up] = start + size / faults.bytes_per_s
            until = self._line[up]
        time.sleep(max(0.0, until + stall - time.monotonic()))
        return time.monotonic()

    def _break(self, pair: Pair) -> None:
        self._links.discard(pair)
        for end in pair:
            _reset(end)


class _quietly:
    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, OSError)


def _reset(end: socket.socket) -> None:
    """Close with a reset and not in order."""
    with _quietly():
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with _quietly():
        end.shutdown(socket.SHUT_RDWR)
    end.close()
