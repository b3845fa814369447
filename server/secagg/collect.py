"""One phase over an exchange: the valid replies by site, and a word about every other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

from medfl.shared.errors import Code, ProtocolError
from medfl.shared.secagg.exchange import Exchange, Phase, PhaseReply, PhaseRequest, SiteRefusal

log = logging.getLogger("medfl.server")

T = TypeVar("T")

MALFORMED = SiteRefusal(Code.PROTOCOL, "malformed reply")
NO_ANSWER = SiteRefusal(Code.NETWORK, "no answer")


def collect(
    exchange: Exchange,
    phase: Phase,
    requests: Mapping[int, PhaseRequest],
    accept: Callable[[int, PhaseReply], T],
    refusals: dict[int, SiteRefusal],
) -> dict[int, T]:
    """What ``accept`` makes of each valid reply, by site; every other site is noted in ``refusals``.

    ``accept`` raises ProtocolError for a reply that is not valid; only a site's first reply is looked at.
    """
    accepted: dict[int, T] = {}
    answered: set[int] = set()
    for site, reply in exchange(phase, requests):
        if site not in requests or site in answered:
            continue
        answered.add(site)
        if isinstance(reply, SiteRefusal):
            refusals[site] = reply
            continue
        try:
            accepted[site] = accept(site, reply)
            refusals.pop(site, None)
        except ProtocolError as error:
            refusals[site] = MALFORMED
            log.warning("%s: a reply was thrown away: %s", phase.value, error)
        finally:
            del reply  # a masked vector: or it would lie here while the next one is put together
    refusals.update(dict.fromkeys(requests.keys() - answered, NO_ANSWER))
    return accepted
