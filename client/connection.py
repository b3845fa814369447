"""One site's authenticated connection to its coordinator: Flower's own client, confined to that one host.

Touches Flower's private modules as :mod:`medfl.client.fleet` does, and lists them there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import httpx
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from medfl.client.transport import (
    Kind,
    LinkTrouble,
    Patience,
    TransportSettings,
    certificate_on_disk,
    confine,
    show_certificate,
    tls_context,
    trouble_of,
)
from medfl.shared.errors import ConfigError
from medfl.shared.keys import fingerprint, load_node_key, node_public_key, public_line

PARALLEL = 4  # transfers on the way at a time: on a slow line, latency is what costs
_TELLING_BYTES = 2**20
_WIDE_BYTES_PER_S = PARALLEL * 5 * 2**20 / 30  # so many pieces of 5 MiB are through in half a minute: 5.6 Mbit/s

log = logging.getLogger("medfl.node")

Q = TypeVar("Q")
A = TypeVar("A")


class Connection:
    """TLS with the site's certificate, each request signed with its node key.

    Methods raise LinkTrouble (see :mod:`medfl.client.transport`).

    Raises on construction:
        ConfigError: a key or certificate is missing, malformed, readable by others, expired, or of elsewhere.
    """

    def __init__(self, transport: TransportSettings, node_key: Path, *, wait_s: int) -> None:
        """``wait_s``: how long the coordinator may hold an empty question."""
        key = load_node_key(node_key)
        self.fingerprint = fingerprint(key.public_key())
        self.public_key = node_public_key(public_line(key.public_key()))
        self._transport = transport
        self._answered = False
        self._narrow = False
        self._tls = tls_context(transport)
        self._shown = certificate_on_disk(transport)
        self.client = FleetHttpClient(
            f"https://{transport.coordinator}",
            interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
            verify=self._tls,
            timeout=transport.timeout_s,
        )
        confine(self.client._client, transport.max_answer_bytes)
        self.client._client.headers["prefer"] = f"wait={wait_s}"
        self._workers = ThreadPoolExecutor(PARALLEL, thread_name_prefix="transfer")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        logging.getLogger("flwr").setLevel(logging.ERROR)
        logging.getLogger("flwr").handlers.clear()

    def close(self) -> None:
        """Close connections; running transfers fail."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        self.client.close()

    def begin(self) -> None:
        """A new attempt to join: until the first answer, being hung up on tells something of our certificate."""
        self._answered = False

    def call(self, method: Callable[[Q], A], request: Q, patience: Patience | None = None) -> A:
        """One request, repeated with ``patience`` while the trouble passes."""
        while True:
            try:
                answer = method(request)
            except httpx.HTTPError as error:
                trouble = trouble_of(error, self._transport.coordinator, answered=self._answered)
                if isinstance(error, httpx.HTTPStatusError):
                    self._answered = True
                if patience is None or not trouble.passes or not patience.pause():
                    raise trouble from None
            except (ValueError, RuntimeError):  # unreadable protobuf; a client that is being closed
                raise LinkTrouble(Kind.BUSY, "the coordinator's answer cannot be read") from None
            else:
                self._answered = True
                return answer

    def post(self, path: str, content: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to a request that is not Flower's; not repeated."""
        coordinator = self._transport.coordinator
        try:
            response = self.client._client.post(f"https://{coordinator}{path}", content=content)
        except httpx.HTTPError as error:
            raise trouble_of(error, coordinator, answered=self._answered) from None
        except RuntimeError:  # this connection is being closed: the node ends, or dials another address
            raise LinkTrouble(Kind.BUSY, "the connection was closed before a check-in") from None
        return response.status_code, response.content

    def soon(self, method: Callable[[Q], A], request: Q) -> None:
        """Make a request that nobody waits for."""
        self._workers.submit(self.call, method, request)

    def each(self, transfer: Callable[[str], A], ids: list[str]) -> Iterator[A]:
        """Side by side, or on a narrow line one by one: a connection that breaks then costs one piece and not four."""
        return map(transfer, ids) if self._narrow else self._workers.map(transfer, ids)

    def note_speed(self, size: int, seconds: float) -> None:
        """Whether the line is too narrow for pieces side by side, which would all arrive late; large messages tell."""
        if size >= _TELLING_BYTES:
            self._narrow = size < _WIDE_BYTES_PER_S * seconds

    def reload_certificate(self) -> None:
        """Take up a certificate that was renewed on the disk; connections from now on show it."""
        found = certificate_on_disk(self._transport)
        if found == self._shown:
            return
        try:
            show_certificate(self._tls, self._transport)
        except ConfigError as error:  # half of it may have been copied by now
            log.warning("the new certificate is not used: %s", error)
            return
        self._shown = found
        log.info("this site's certificate on the disk is a new one: it is shown from now on")
