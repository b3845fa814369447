"""The gRPC health service, asked by the standard client."""

from __future__ import annotations

import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from medfl.shared.errors import NetworkError
from medfl.shared.health import Health

STATUS = health_pb2.HealthCheckResponse.ServingStatus


def ask(port: int, host: str = "127.0.0.1") -> str:
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        return str(STATUS.Name(answer.status))


def test_it_says_what_it_was_told_and_is_gone_afterwards() -> None:
    with Health(0) as health:
        assert ask(health.port) == "NOT_SERVING"
        health.set("serving")
        assert ask(health.port) == "SERVING"
        health.set("not_serving")
        assert ask(health.port) == "NOT_SERVING"
        port = health.port
    with pytest.raises(grpc.RpcError):
        ask(port)


def test_a_port_in_use_is_told() -> None:
    with Health(0) as health, pytest.raises(NetworkError, match="cannot listen"), Health(health.port):
        pass


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
def test_an_ipv6_address_is_listened_on() -> None:
    with Health(0, host="::1") as health:
        assert ask(health.port, host="[::1]") == "NOT_SERVING"
