"""What systemd hears, with a datagram socket in its place."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import medfl.shared.supervision
from medfl.shared.supervision import Supervision


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(60)
        yield receiver


def environment(systemd: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": systemd.getsockname(), **more}


def test_ready_status_and_stopping_are_told(systemd: socket.socket) -> None:
    with Supervision(lambda: True, environment=environment(systemd)) as service:
        service.ready()
        service.status("waiting\nfor work")
    assert [systemd.recv(100) for _ in range(3)] == [b"READY=1", b"STATUS=waiting for work", b"STOPPING=1"]


def test_the_watchdog_is_fed_three_times_as_often_as_it_asks(systemd: socket.socket) -> None:
    with Supervision(lambda: True, environment=environment(systemd, WATCHDOG_USEC="300000")):
        started = time.monotonic()
        assert [systemd.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        assert 0.25 < time.monotonic() - started < 30  # 3 times 0.1 s


def test_a_service_that_is_not_alive_does_not_feed_it(systemd: socket.socket) -> None:
    with Supervision(lambda: False, environment=environment(systemd, WATCHDOG_USEC="30000")):
        time.sleep(0.2)
    assert systemd.recv(100) == b"STOPPING=1"  # the first word at all


def test_a_watchdog_meant_for_another_process_is_left_alone(systemd: socket.socket) -> None:
    theirs = environment(systemd, WATCHDOG_USEC="30000", WATCHDOG_PID=str(os.getpid() + 1))
    with Supervision(lambda: True, environment=theirs):
        time.sleep(0.2)
    assert systemd.recv(100) == b"STOPPING=1"


def test_an_abstract_address_is_reached() -> None:
    name = f"medfl-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + name)
        receiver.settimeout(60)
        Supervision(lambda: True, environment={"NOTIFY_SOCKET": "@" + name}).ready()
        assert receiver.recv(100) == b"READY=1"


def test_a_supervisor_that_does_not_listen_does_not_hold_the_service(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(medfl.shared.supervision, "_PATIENCE_S", 0.01)
    started = time.monotonic()
    with Supervision(lambda: True, environment=environment(systemd)) as service:
        for _ in range(100):  # its queue holds about ten
            service.status("waiting")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("given", [{}, {"NOTIFY_SOCKET": "/nowhere/at/all", "WATCHDOG_USEC": "soon"}])
def test_without_systemd_nothing_happens(given: dict[str, str]) -> None:
    with Supervision(lambda: True, environment=given) as service:
        service.ready()
