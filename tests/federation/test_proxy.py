"""Hospitals that reach the outside only through an HTTP proxy."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from federation import Lab

from medfl.client.node import check
from medfl.client.transport import Kind, LinkTrouble


class Proxy:
    """An HTTP CONNECT proxy that serves one connection after another, and notes where they went."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.asked: list[str] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                inner, _ = self.listener.accept()
            except OSError:
                return
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += inner.recv(1)
            target = head.split()[1].decode()
            self.asked.append(target)
            host, port = target.split(":")
            outer = socket.create_connection((host, int(port)))
            inner.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            for source, sink in ((inner, outer), (outer, inner)):
                threading.Thread(target=self.copy, args=(source, sink), daemon=True).start()

    def copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy()
    for name in ("NO_PROXY", "no_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    yield proxy
    proxy.listener.close()


def test_the_coordinator_is_reached_through_the_proxy_with_tls_end_to_end(lab: Lab, proxy: Proxy) -> None:
    link = lab.link()
    check(lab.node_settings("north", link.port))
    assert set(proxy.asked) == {f"127.0.0.1:{link.port}"}


def test_a_proxy_that_is_not_there_is_told(lab: Lab, proxy: Proxy) -> None:
    link = lab.link()
    proxy.listener.shutdown(socket.SHUT_RDWR)
    proxy.listener.close()
    with pytest.raises(LinkTrouble) as caught:
        check(lab.node_settings("north", link.port))
    assert caught.value.kind is Kind.UNREACHABLE
