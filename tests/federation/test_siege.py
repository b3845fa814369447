"""Somebody who only wants to be in the way: slow heads, silent connections, a thousand of them, and pure noise."""

from __future__ import annotations

import os
import random
import socket
import ssl
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from federation import Lab, question, text_of, until

from medfl.client.transport import TransportSettings, tls_context
from medfl.server.connections import Patience
from medfl.server.guard import Limits
from medfl.server.link import Link

MIB = 1024 * 1024


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def dial(link: Link, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), timeout=60, source_address=(source, 0))


def member(lab: Lab, link: Link, site: str = "west") -> ssl.SSLSocket:
    """A connection with a certificate of the consortium."""
    files = lab.consortium.sites[site]
    context = tls_context(TransportSettings("", files.authority, files.certificate, files.key))
    return context.wrap_socket(dial(link), server_hostname="127.0.0.1")


def is_closed(connection: socket.socket, within_s: float) -> bool:
    connection.settimeout(within_s)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def is_healthy(lab: Lab, link: Link) -> bool:
    """Whether a new connection of a member is served."""
    with suppress(OSError), member(lab, link) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        return connection.recv(1000).startswith(b"HTTP/1.1 200")
    return False


def answers(link: Link, node: int) -> bool:
    with link.run(None, name="study", digest="d" * 64) as run:
        (reply,) = run.grid.send_and_receive([question(node)], timeout=60)
        return not reply.has_error() and text_of(reply) == "hello"


@pytest.mark.parametrize(
    "head", [b"", b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\nx-slow: "], ids=["silent", "slow"]
)
def test_a_connection_without_a_whole_head_is_closed(lab: Lab, head: bytes) -> None:
    link = lab.link(patience=Patience(head_s=0.5))
    with member(lab, link) as connection:
        for _ in range(150):  # a byte now and then does not help
            with suppress(OSError):
                connection.sendall(head + b"a" if head else b"")
            head = head and b"a"
            if is_closed(connection, 0.2):
                return
    pytest.fail("still open after 30 s")


def test_a_second_request_may_not_be_slower_than_the_first(lab: Lab) -> None:
    link = lab.link(patience=Patience(head_s=1.5))
    with member(lab, link) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        time.sleep(2.0)  # between requests there is time
        connection.sendall(b"GET /health HT")
        assert is_closed(connection, 60)


def test_a_handshake_that_does_not_end_is_given_up(lab: Lab) -> None:
    link = lab.link(patience=Patience(handshake_s=0.5))
    with dial(link) as connection:
        assert is_closed(connection, 60)
    with dial(link) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00")  # the first bytes of a ClientHello, and no more
        assert is_closed(connection, 60)


def test_one_member_cannot_take_the_places_of_the_others(lab: Lab) -> None:
    link = lab.link(patience=Patience(per_certificate=4))
    north = link.enrol(lab.roster())["north"]
    with ExitStack() as stack:
        held = [stack.enter_context(member(lab, link)) for _ in range(20)]
        until(lambda: sum(is_closed(connection, 0.01) for connection in held) == 16)
        lab.node("north", link.port)
        until(lambda: link.online() == {north})
        assert answers(link, north)
    until(lambda: is_healthy(lab, link))  # places that were given back are there again


def test_handshakes_under_way_are_few_for_one_address_and_few_for_all_and_their_places_come_back(lab: Lab) -> None:
    link = lab.link(patience=Patience(handshake_s=120.0, handshakes=6, handshakes_of_one=4))
    with ExitStack() as stack:
        greedy = [stack.enter_context(dial(link, "127.0.0.2")) for _ in range(9)]
        until(lambda: sum(is_closed(connection, 0.01) for connection in greedy) == 5)
        assert is_healthy(lab, link)
        others = [stack.enter_context(dial(link, f"127.0.0.{last}")) for last in (3, 4, 5, 6)]
        until(lambda: sum(is_closed(connection, 0.01) for connection in others) == 2)
    until(lambda: is_healthy(lab, link))


def test_a_thousand_connections_let_nobody_in_lose_nothing_and_cost_bounded_memory(lab: Lab) -> None:
    link = lab.link(patience=Patience(handshake_s=120.0))
    ids = link.enrol(lab.roster())
    lab.node("north", link.port)
    until(lambda: link.online() == {ids["north"]})
    before = resident_bytes()
    with ExitStack() as stack:
        for number in range(1000):
            connection = stack.enter_context(dial(link, "127.0.0.2"))
            if number % 2:
                connection.sendall(b"\x16\x03\x01\x02\x00")
        with link.run(None, name="study", digest="d" * 64) as run:
            for _ in range(3):
                (reply,) = run.grid.send_and_receive([question(ids["north"])], timeout=60)
                assert text_of(reply) == "hello"
        assert link.online() == {ids["north"]}
        assert resident_bytes() - before < 80 * MIB  # 64 handshakes of 0.3 MiB, and both ends of 1000 sockets
    until(lambda: answers(link, ids["north"]))


def test_noise_in_place_of_tls_of_http_and_of_messages_reaches_nobody(lab: Lab) -> None:
    limits = Limits(max_body_bytes=100_000, max_pause_s=0.5)
    link = lab.link(limits=limits, patience=Patience(handshake_s=30.0, head_s=0.5))
    ids = link.enrol(lab.roster())
    lab.node("north", link.port)
    until(lambda: link.online() == {ids["north"]})
    noise = random.Random(7)
    for _ in range(40):
        with dial(link) as connection, suppress(OSError):
            connection.sendall(noise.randbytes(noise.randrange(1, 2000)))
    paths = ("pull-messages", "push-messages", "push-object", "pull-object", "send-node-heartbeat", "activate-node")
    for number in range(80):
        body = noise.randbytes(noise.randrange(0, 3000))
        path = f"/v1/fleet/{noise.choice(paths)}" if number % 3 else "/" + noise.randbytes(20).hex()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        head += noise.choice(
            ["content-type: application/protobuf\r\n", "transfer-encoding: chunked\r\n", "", "x:\r\ny\r\n"]
        )
        head += noise.choice(["flwr-public-key: eA==\r\nflwr-signature: eA==\r\nflwr-timestamp: 1\r\n", ""])
        with member(lab, link) as connection, suppress(OSError):
            connection.sendall(head.encode() + b"\r\n" + body if number % 5 else noise.randbytes(500))
            connection.settimeout(30)
            answer = connection.recv(1000)
            assert not answer.startswith(b"HTTP/1.1 2"), head
    assert link.online() == {ids["north"]}
    until(lambda: answers(link, ids["north"]))
