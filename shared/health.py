"""The standard gRPC health service, for Kubernetes and load balancers; on loopback unless told otherwise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from medfl.shared.addresses import address
from medfl.shared.errors import NetworkError


class Health:
    """``with Health(port) as service: service.set("serving")``; begins as not serving.

    ``port`` 0 takes any free port, then found in :attr:`port`. Says nothing but serving or not: no authentication.

    Raises on entry:
        NetworkError: the address cannot be listened on.
    """

    def __init__(self, port: int, *, host: str = "127.0.0.1") -> None:
        self.port = port
        self._host = host
        self._servicer = health.HealthServicer()
        # Without SO_REUSEPORT, so that a second process on the same port is an error and not half of the answers.
        self._server = grpc.server(ThreadPoolExecutor(2, "health"), options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        self.set("not_serving")

    def __enter__(self) -> Self:
        """Listen."""
        try:
            self.port = self._server.add_insecure_port(address(self._host, self.port))
        except RuntimeError:
            raise NetworkError(f"health: cannot listen on {self._host} port {self.port}: choose another port") from None
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Tell watchers that we stop, and close the port."""
        self._servicer.enter_graceful_shutdown()
        self._server.stop(grace=0.5).wait()

    def set(self, status: Literal["serving", "not_serving"]) -> None:
        """What is answered from now on."""
        serving = health_pb2.HealthCheckResponse.ServingStatus
        self._servicer.set("", serving.SERVING if status == "serving" else serving.NOT_SERVING)
