"""The guard alone, driven message by message."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from medfl.server.guard import Guard, Limits


def serve(
    path: str, pieces: Iterable[bytes] = (b"",), headers: Iterable[tuple[bytes, bytes]] = (), pause_s: float = 0.0
) -> tuple[int, bytes]:
    """Status, and the body that the application behind the guard saw (or b'unseen')."""
    seen = b"unseen"
    sent: list[dict[str, object]] = []
    left = list(pieces)

    async def app(scope, receive, send):  # type: ignore[no-untyped-def]
        nonlocal seen
        seen = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> dict[str, object]:
        await asyncio.sleep(pause_s)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    limits = Limits(10, max_pause_s=0.05, max_body_s=0.12) if pause_s else Limits(10)
    guard = Guard(app, limits)
    asyncio.run(guard({"type": "http", "path": path, "headers": list(headers)}, receive, send))  # type: ignore[arg-type]
    return int(str(sent[0]["status"])), seen


@pytest.mark.parametrize("path", ["/", "/docs", "/v1/control/x", "/v1/fleet", "/healthz", "/health/", "/V1/FLEET/x"])
def test_other_paths_do_not_exist(path: str) -> None:
    assert serve(path) == (404, b"unseen")


def test_a_body_is_handed_on_whole() -> None:
    assert serve("/v1/fleet/x", [b"01234", b"56789"]) == (200, b"0123456789")
    assert serve("/health") == (200, b"")


def test_a_body_over_the_cap_is_refused_by_announcement_and_by_count() -> None:
    assert serve("/v1/fleet/x", [b""], [(b"content-length", b"11")]) == (413, b"unseen")
    assert serve("/v1/fleet/x", [b"01234", b"567890", b"more"]) == (413, b"unseen")
    assert serve("/v1/fleet/x", [b""], [(b"content-length", b"-1")]) == (400, b"unseen")


def test_a_pause_and_a_trickle_are_given_up() -> None:
    assert serve("/v1/fleet/x", [b"0"], pause_s=0.1) == (408, b"unseen")
    assert serve("/v1/fleet/x", [b"0"] * 9, pause_s=0.03) == (408, b"unseen")  # 0.27 s in all
