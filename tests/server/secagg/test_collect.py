"""One phase over an exchange: which replies count, and what is said of the other sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from medfl.server.secagg.collect import MALFORMED, NO_ANSWER, collect
from medfl.shared.errors import Code, ProtocolError
from medfl.shared.secagg.exchange import Phase, PhaseReply, PhaseRequest, SiteRefusal

REFUSED = SiteRefusal(Code.REFUSED, "not today")


def run(
    *arriving: tuple[int, PhaseReply | SiteRefusal],
    asked: tuple[int, ...],
    before: dict[int, SiteRefusal] | None = None,
) -> tuple[dict[int, bytes], dict[int, SiteRefusal], list[int]]:
    """(accepted, refusals, sites whose reply was looked at); a reply ``b"bad"`` is not valid."""
    refusals, seen = dict(before or {}), []

    def exchange(phase: Phase, requests: Mapping[int, PhaseRequest]) -> Iterator[tuple[int, PhaseReply | SiteRefusal]]:
        yield from arriving

    def accept(site: int, reply: PhaseReply) -> bytes:
        seen.append(site)
        if reply.control == b"bad":
            raise ProtocolError("bad")
        return reply.control

    requests = {site: PhaseRequest(b"") for site in asked}
    return collect(exchange, Phase.UNMASK, requests, accept, refusals), refusals, seen


def test_only_the_first_reply_of_a_site_that_was_asked_is_looked_at() -> None:
    found = run((1, PhaseReply(b"one")), (1, PhaseReply(b"two")), (9, PhaseReply(b"stranger")), asked=(1,))
    assert found == ({1: b"one"}, {}, [1])


def test_a_second_reply_does_not_mend_a_first_one_that_was_malformed() -> None:
    assert run((1, PhaseReply(b"bad")), (1, PhaseReply(b"good")), asked=(1,)) == ({}, {1: MALFORMED}, [1])


def test_a_site_that_answers_now_is_no_longer_noted_as_one_that_did_not() -> None:
    found = run((1, PhaseReply(b"one")), (2, REFUSED), asked=(1, 2, 3), before={1: NO_ANSWER, 2: NO_ANSWER})
    assert found == ({1: b"one"}, {2: REFUSED, 3: NO_ANSWER}, [1])
