"""Patience, caps and words, without a network."""

from __future__ import annotations

import time
from email.utils import formatdate
from threading import Event

import httpx
import pytest

from medfl.client import transport
from medfl.client.transport import Kind, LinkTrouble, Patience, confine, trouble_of


def status_error(status: int, **headers: str) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://c")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(status, headers=headers, request=request))


@pytest.mark.parametrize(
    ("status", "kind", "passes"),
    [
        (401, Kind.NOT_ENROLLED, False),
        (403, Kind.RUN_CLOSED, False),
        (412, Kind.REFUSED, False),
        (302, Kind.REFUSED, False),
        (413, Kind.TOO_LARGE, False),
        (408, Kind.BUSY, True),
        (429, Kind.BUSY, True),
        (500, Kind.BUSY, True),
        (503, Kind.BUSY, True),
    ],
)
def test_each_status_has_its_meaning(status: int, kind: Kind, passes: bool) -> None:
    trouble = trouble_of(status_error(status), "c:1", answered=True)
    assert (trouble.kind, trouble.passes) == (kind, passes)
    assert trouble.exit_status == 5


def test_a_refusal_with_a_clock_apart_names_the_clock() -> None:
    behind = trouble_of(status_error(401, date=formatdate(time.time() - 60, usegmt=True)), "c:1", answered=True)
    assert behind.kind is Kind.CLOCK
    assert "60 s ahead of c:1" in str(behind) or "61 s ahead of c:1" in str(behind)
    same = trouble_of(status_error(401, date=formatdate(usegmt=True)), "c:1", answered=True)
    assert same.kind is Kind.NOT_ENROLLED


def test_being_hung_up_on_means_our_certificate_only_before_the_first_answer() -> None:
    cut = httpx.RemoteProtocolError("Server disconnected without sending a response.")
    assert trouble_of(cut, "c:1", answered=False).kind is Kind.OUR_CERTIFICATE
    assert trouble_of(cut, "c:1", answered=True).kind is Kind.UNREACHABLE
    assert trouble_of(httpx.ReadTimeout(""), "c:1", answered=False).kind is Kind.UNREACHABLE
    assert "HTTPS_PROXY" in str(trouble_of(httpx.ProxyError(""), "c:1", answered=False))


class Watch(Event):
    """A stop that never comes, and the clock that waiting for it moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        return False

    def monotonic(self) -> float:
        return 100 + sum(self.waits)


def test_patience_grows_is_bounded_and_ends_with_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    with monkeypatch.context() as patched:
        patched.setattr(transport, "time", watch)
        patience = Patience(watch, limit_s=20, first_s=2, longest_s=5)
        while patience.pause():
            pass
    assert sum(watch.waits) == pytest.approx(20)
    for seconds, longest in zip(watch.waits[:-1], (2, 4, *[5] * 20), strict=False):  # the last is what was left
        assert longest / 2 <= seconds <= longest
    stop = Event()
    stop.set()
    assert not Patience(stop, limit_s=60, first_s=60).pause()


def client_answering(response: httpx.Response) -> httpx.Client:
    client = httpx.Client(transport=httpx.MockTransport(lambda request: response), follow_redirects=True)
    confine(client, max_answer_bytes=100)
    return client


def test_an_answer_over_the_cap_is_not_read_announced_or_not() -> None:
    read = 0

    def endless():  # type: ignore[no-untyped-def]
        nonlocal read
        while read < 10_000:
            read += 50
            yield b"0" * 50

    assert client_answering(httpx.Response(200, content=b"0" * 100)).get("https://c").content == b"0" * 100
    for response in (httpx.Response(200, content=b"0" * 101), httpx.Response(200, content=endless())):
        with pytest.raises(LinkTrouble) as caught:
            client_answering(response).get("https://c")
        assert caught.value.kind is Kind.TOO_LARGE
    assert read <= 200


def test_a_compressed_answer_is_refused_and_a_redirect_not_followed() -> None:
    with pytest.raises(LinkTrouble):
        client_answering(httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b""))).get(
            "https://c"
        )
    client = client_answering(httpx.Response(307, headers={"location": "https://elsewhere"}))
    assert client.get("https://c").status_code == 307


def test_the_answer_to_a_large_body_is_awaited_longer_for_a_narrow_way_takes_minutes_for_it() -> None:
    waited: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        waited.append(request.extensions["timeout"]["read"])
        return httpx.Response(200)

    with httpx.Client(transport=httpx.MockTransport(answer), timeout=10) as client:
        confine(client, 1000)
        client.post("https://c", content=b"question")
        client.post("https://c", content=b"0" * 5 * 2**20)
    assert waited == [10, 300]
