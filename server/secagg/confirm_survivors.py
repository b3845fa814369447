"""Phase 4 at the coordinator: show everybody the survivors, collect their signatures."""

from __future__ import annotations

from medfl.server.secagg.pending import PendingSum
from medfl.shared.errors import ProtocolError
from medfl.shared.secagg.exchange import PhaseReply, PhaseRequest
from medfl.shared.secagg.messages import Confirmation, SurvivorList
from medfl.shared.secagg.roster import Roster


def requests(pending: PendingSum) -> dict[int, PhaseRequest]:
    """The same list for every survivor."""
    return dict.fromkeys(pending.survivors, PhaseRequest(SurvivorList(pending.context, pending.survivors).to_bytes()))


def accept(pending: PendingSum, roster: Roster, site: int, reply: PhaseReply) -> Confirmation:
    """The confirmation in ``reply``. Raises ProtocolError when ``site`` did not sign these survivors."""
    confirmation = Confirmation.parse(reply.control)
    if confirmation.site != site:
        raise ProtocolError("a site answered in another's name")
    payload = Confirmation.signed(pending.context, pending.key_list_digest, pending.survivors)
    roster.check_signature(site, confirmation.signature, payload)
    return confirmation
