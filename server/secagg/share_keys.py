"""Phase 2 at the coordinator: show everybody all keys, collect the encrypted shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from medfl.server.secagg.advertise_keys import KeysAdvertised
from medfl.shared.errors import ProtocolError
from medfl.shared.secagg.exchange import PhaseReply, PhaseRequest
from medfl.shared.secagg.messages import SealedShares
from medfl.shared.secagg.roster import Roster


@dataclass(frozen=True)
class KeysShared:
    """After phase 2: the sites whose shares are there (U2). Only they can be in the sum or be unmasked."""

    before: KeysAdvertised
    shares: Mapping[int, SealedShares]

    @cached_property
    def sharers(self) -> tuple[int, ...]:
        """U2, ascending."""
        return tuple(sorted(self.shares))


def requests(state: KeysAdvertised) -> dict[int, PhaseRequest]:
    """The same key list for every site of U1."""
    return dict.fromkeys(state.adverts, PhaseRequest(state.key_list.to_bytes()))


def accept(state: KeysAdvertised, roster: Roster, site: int, reply: PhaseReply) -> SealedShares:
    """The shares in ``reply``. Raises ProtocolError unless ``site`` signed them, one for each other site of U1."""
    shares = SealedShares.parse(reply.control)
    if shares.site != site or {receiver for receiver, _ in shares.sealed} != set(state.adverts) - {site}:
        raise ProtocolError("a site answered in another's name, or not with one share for each other site")
    roster.check_signature(site, shares.signature, shares.signed(state.context, state.key_list_digest))
    return shares
