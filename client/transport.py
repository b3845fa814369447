"""One TLS connection to the coordinator and what can go wrong with it, said in words.

TLS 1.3, our own certificate shown, only the pinned authority trusted, no redirects, bounded answers. A proxy in
``HTTPS_PROXY`` is used by httpx as usual: TLS goes through it end to end.
"""

from __future__ import annotations

import email.utils
import random
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from pathlib import Path
from threading import Event

import httpx

from medfl.shared.certificates import check_certificate
from medfl.shared.errors import ConfigError, NetworkError
from medfl.shared.keys import read_private
from medfl.shared.passphrase import passphrase

_LARGE_BYTES = 64 * 1024
_UPLOAD_S = 300.0  # for the answer to a larger body: what the system has taken from us may not have left yet
CLOCK_TOLERANCE_S = 5.0  # a request signed further in the future is refused


class Kind(StrEnum):
    """What is wrong between us and the coordinator."""

    UNREACHABLE = "unreachable"  # no route, no name, refused, cut off, too slow
    UNKNOWN_AUTHORITY = "unknown authority"  # its certificate is not signed by ours
    EXPIRED = "expired"  # its certificate is no longer, or not yet, valid
    WRONG_NAME = "wrong name"  # its certificate is for another host
    OUR_CERTIFICATE = "our certificate"  # it refuses ours
    NOT_ENROLLED = "not enrolled"  # it does not know our node key
    CLOCK = "clock"  # our clocks differ too much
    BUSY = "busy"  # 429 or 5xx: it cannot answer now
    RUN_CLOSED = "run closed"  # 403: the run is over
    REFUSED = "refused"  # any other status
    TOO_LARGE = "too large"  # its answer exceeds our cap, or our message its cap


class LinkTrouble(NetworkError):
    """The coordinator cannot be reached or does not accept who we are; ``kind`` says which, ``status`` is HTTP's."""

    def __init__(self, kind: Kind, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status

    @property
    def passes(self) -> bool:
        """Whether the same request may well succeed in a moment."""
        return self.kind in (Kind.UNREACHABLE, Kind.BUSY)


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """Whom to dial, and our side of TLS."""

    coordinator: str  # host:port
    authority: Path  # certificate of the consortium's authority, PEM
    certificate: Path
    key: Path
    timeout_s: float = 60.0  # of connecting, and between two pieces of an answer
    max_answer_bytes: int = 20 * 1024 * 1024


def tls_context(settings: TransportSettings) -> ssl.SSLContext:
    """TLS 1.3 with our certificate, trusting nothing but the pinned authority.

    Raises:
        ConfigError: a file is missing, malformed, readable by others, expired, or not of this consortium.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    show_certificate(context, settings)
    return context


def show_certificate(context: ssl.SSLContext, settings: TransportSettings) -> None:
    """Make new connections of ``context`` show the certificate that is on the disk now.

    Raises:
        ConfigError: as :func:`tls_context`; what was shown before is shown still.
    """
    check_certificate(settings.certificate, authority=settings.authority)
    read_private(settings.key)
    try:
        context.load_verify_locations(settings.authority)
        context.load_cert_chain(settings.certificate, settings.key, password=passphrase)
    except ssl.SSLError:
        raise ConfigError(f"{settings.key}: does not belong to the certificate {settings.certificate}") from None


def certificate_on_disk(settings: TransportSettings) -> bytes:
    """What tells one certificate from its renewal; empty where there is none now."""
    try:
        return settings.certificate.read_bytes()
    except OSError:
        return b""


def confine(client: httpx.Client, max_answer_bytes: int) -> None:
    """Make ``client`` follow no redirect and read no answer beyond ``max_answer_bytes``, compressed or not."""
    client.follow_redirects = False
    client.headers["accept-encoding"] = "identity"

    def cap(response: httpx.Response) -> None:
        too_large = int(response.headers.get("content-length", "0")) > max_answer_bytes
        if too_large or response.headers.get("content-encoding", "identity") != "identity":
            response.close()
            raise LinkTrouble(Kind.TOO_LARGE, f"the coordinator's answer exceeds {max_answer_bytes} bytes")
        if isinstance(response.stream, httpx.SyncByteStream):
            response.stream = _Capped(response.stream, max_answer_bytes)

    def wait_for_upload(request: httpx.Request) -> None:
        if int(request.headers.get("content-length", "0")) > _LARGE_BYTES:
            request.extensions["timeout"] = {**request.extensions.get("timeout", {}), "read": _UPLOAD_S}

    client.event_hooks = {"request": [wait_for_upload], "response": [cap]}


class _Capped(httpx.SyncByteStream):
    """A body that stops being read when it exceeds its cap: its announced length may be missing."""

    def __init__(self, stream: httpx.SyncByteStream, max_bytes: int) -> None:
        self._stream = stream
        self._left = max_bytes

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._stream:
            self._left -= len(piece)
            if self._left < 0:
                raise LinkTrouble(Kind.TOO_LARGE, "the coordinator's answer exceeds the cap")
            yield piece

    def close(self) -> None:
        self._stream.close()


class Patience:
    """Growing pauses with jitter, until ``stop`` is set or ``limit_s`` seconds are over."""

    def __init__(self, stop: Event, *, limit_s: float, first_s: float = 0.25, longest_s: float = 10.0) -> None:
        self._stop = stop
        self._until = time.monotonic() + limit_s
        self._first_s = self._next_s = first_s
        self._longest_s = longest_s

    def pause(self) -> bool:
        """Sleep, and return True when it is worth trying again."""
        left = self._until - time.monotonic()
        if left <= 0 or self._stop.wait(min(self._next_s * random.uniform(0.5, 1.0), left)):
            return False
        self._next_s = min(self._next_s * 2, self._longest_s)
        return True

    def reset(self) -> None:
        """Begin again with the first pause."""
        self._next_s = self._first_s


def trouble_of(error: httpx.HTTPError, coordinator: str, *, answered: bool) -> LinkTrouble:
    """What ``error`` means for the person at this machine; ``answered``: whether this session had any answer yet.

    In TLS 1.3 a client has finished its handshake before the server looks at its certificate: a refusal is a
    connection that is closed before the first answer.
    """
    if isinstance(error, httpx.HTTPStatusError):
        return _trouble_of_status(error.response, coordinator)
    tls = _tls_error(error)
    if isinstance(tls, ssl.SSLCertVerificationError):
        return _trouble_of_verification(tls, coordinator)
    cut = isinstance(error, (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError))
    if (cut and not answered) or (tls is not None and "alert" in str(tls).lower()):
        return LinkTrouble(
            Kind.OUR_CERTIFICATE,
            f"{coordinator} hangs up on this site's client certificate: it has expired or was revoked; call the "
            "coordinator, enroll again, have the request approved, and join",
        )
    if isinstance(error, httpx.ProxyError):
        return LinkTrouble(Kind.UNREACHABLE, f"{coordinator}: the proxy in HTTPS_PROXY does not connect us")
    if isinstance(error, httpx.TimeoutException):
        return LinkTrouble(Kind.UNREACHABLE, f"{coordinator}: no answer in time: check the network and the firewall")
    if isinstance(error, httpx.ConnectError) and tls is None:
        reason = "name unknown" if "name" in str(error).lower() else "not reachable"
        return LinkTrouble(
            Kind.UNREACHABLE, f"{coordinator}: {reason}: check host and port, the network and whether it runs"
        )
    return LinkTrouble(Kind.UNREACHABLE, f"{coordinator}: the connection was cut")


def _trouble_of_status(response: httpx.Response, coordinator: str) -> LinkTrouble:
    status = response.status_code
    match status:
        case HTTPStatus.UNAUTHORIZED:
            ahead = _seconds_ahead(response)
            if abs(ahead) > CLOCK_TOLERANCE_S:
                side = "ahead of" if ahead > 0 else "behind"
                return LinkTrouble(
                    Kind.CLOCK, f"this machine's clock is {_duration(ahead)} {side} {coordinator}: set it by NTP"
                )
            return LinkTrouble(Kind.NOT_ENROLLED, f"{coordinator} does not accept this site's node key")
        case HTTPStatus.FORBIDDEN:
            return LinkTrouble(Kind.RUN_CLOSED, f"{coordinator}: the run is over")
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return LinkTrouble(Kind.TOO_LARGE, f"{coordinator} does not accept a message of this size")
        case HTTPStatus.TOO_MANY_REQUESTS | HTTPStatus.REQUEST_TIMEOUT:
            return LinkTrouble(Kind.BUSY, f"{coordinator} is busy (HTTP {status})")
        case _ if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return LinkTrouble(Kind.BUSY, f"{coordinator} has a problem (HTTP {status}): see its log")
        case _:
            return LinkTrouble(Kind.REFUSED, f"{coordinator} refuses the request (HTTP {status})", status=status)


def _duration(seconds: float) -> str:
    size = abs(seconds)
    return f"{size / 60:.0f} minutes" if size >= 120 else f"{size:.0f} s"


def _trouble_of_verification(error: ssl.SSLCertVerificationError, coordinator: str) -> LinkTrouble:
    # The codes are OpenSSL's X509_V_ERR_*: 9 not yet valid, 10 expired, 62 and 64 name or address mismatch.
    match error.verify_code:
        case 9 | 10:
            word = "has expired" if error.verify_code == 10 else "is not valid yet"
            return LinkTrouble(
                Kind.EXPIRED, f"{coordinator}: its certificate {word}: tell the coordinator, and check this clock"
            )
        case 62 | 64:
            return LinkTrouble(
                Kind.WRONG_NAME, f"{coordinator}: its certificate is for another name: check the host you dial"
            )
        case _:
            return LinkTrouble(
                Kind.UNKNOWN_AUTHORITY,
                f"{coordinator}: its certificate is not signed by the authority this site trusts: check the address, "
                "and authority.pem with the coordinator",
            )


def _tls_error(error: BaseException | None) -> ssl.SSLError | None:
    """The TLS error at the bottom of httpx's chain of exceptions, if there is one."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _seconds_ahead(response: httpx.Response) -> float:
    """Our clock minus the coordinator's, in whole seconds; 0 when it does not say."""
    try:
        return time.time() - email.utils.parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return 0.0
