"""Phase 5 at the site: once enough sites have signed the same survivors, give one share for each sharer."""

from __future__ import annotations

from medfl.client.secagg.confirm_survivors import Confirmed
from medfl.client.secagg.enrolment import Enrolment
from medfl.shared.errors import PolicyRefusal, ProtocolError
from medfl.shared.secagg.messages import Confirmation, ConfirmationList, Reveal
from medfl.shared.secagg.reasons import Reason


def unmask(state: Confirmed, request: ConfirmationList, enrolment: Enrolment) -> Reveal:
    """Verify the confirmations and reveal: the seed share of who survived, the mask-key share of who did not.

    Which of the two follows from the survivors this site signed, never from the request; so no site's two shares
    both leave.

    Raises:
        ProtocolError: a confirmation is forged or covers other survivors.
        PolicyRefusal: fewer confirmations than the threshold.
    """
    before = state.before
    context = before.announcement.context()
    payload = Confirmation.signed(context, before.key_list, state.survivors)
    for confirmation in request.confirmations:
        if confirmation.site not in state.survivors:
            raise ProtocolError("a site confirms that did not survive", reason=Reason.BAD_SURVIVORS)
        enrolment.roster.check_signature(confirmation.site, confirmation.signature, payload)
    if len(request.confirmations) < before.announcement.threshold:
        raise PolicyRefusal(
            f"{len(request.confirmations)} sites confirm the survivors, and {before.announcement.threshold} are needed",
            reason=Reason.TOO_FEW_CONFIRMATIONS,
        )
    shares = tuple(
        (owner, of_seed if owner in state.survivors else of_mask_key)
        for owner, (of_mask_key, of_seed) in sorted(before.shares.items())
    )
    unsigned = Reveal(enrolment.site, shares)
    return Reveal(enrolment.site, shares, enrolment.key.sign(unsigned.signed(context, before.key_list)))
