"""A Prometheus endpoint on loopback: counters and gauges of this process, for whoever watches the machine."""

from __future__ import annotations

from typing import Self

from prometheus_client import CollectorRegistry, start_http_server

from medfl.shared.errors import NetworkError


class MetricsPort:
    """``with MetricsPort(registry, port):`` serves ``/metrics``. ``port`` 0 takes any free one, then in :attr:`port`.

    There is no authentication: what ``registry`` holds must be fit for everybody on this machine.

    Raises on entry:
        NetworkError: the address cannot be listened on.
    """

    def __init__(self, registry: CollectorRegistry, port: int, *, host: str = "127.0.0.1") -> None:
        self.port = port
        self._registry = registry
        self._host = host

    def __enter__(self) -> Self:
        """Listen."""
        try:
            self._server, self._thread = start_http_server(self.port, self._host, self._registry)
        except OSError as error:
            raise NetworkError(
                f"metrics: cannot listen on {self._host} port {self.port} ({error.strerror}): choose another port"
            ) from None
        self.port = self._server.server_port
        return self

    def __exit__(self, *_: object) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
