"""Phase 4 at the site: sign one list of survivors, and never another."""

from __future__ import annotations

from dataclasses import dataclass

from medfl.client.secagg.enrolment import Enrolment
from medfl.client.secagg.masked_input import Masked
from medfl.shared.errors import PolicyRefusal, ProtocolError
from medfl.shared.secagg.messages import Confirmation, SurvivorList
from medfl.shared.secagg.reasons import Reason


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The site after phase 4: the round counts as consumed."""

    before: Masked
    survivors: tuple[int, ...]  # U3, ascending


def confirm_survivors(state: Masked, request: SurvivorList, enrolment: Enrolment) -> tuple[Confirmed, Confirmation]:
    """Check that the sum would hide this site among enough others, and sign the list.

    Raises:
        ProtocolError: the list lacks this site or has one whose shares it does not hold.
        PolicyRefusal: too few survivors, or not the ones of the sum that is repeated.
    """
    survivors, announcement = set(request.survivors), state.announcement
    if enrolment.site not in survivors or not survivors <= state.shares.keys():
        raise ProtocolError(
            "the survivors lack this site, or have one whose shares are not here", reason=Reason.BAD_SURVIVORS
        )
    least = max(announcement.threshold, enrolment.minimum_cohort)
    if len(survivors) < least:
        raise PolicyRefusal(
            f"{len(survivors)} sites survived, and at least {least} are needed", reason=Reason.COHORT_TOO_SMALL
        )
    if not state.must_survive <= survivors:
        raise PolicyRefusal(
            "a repeated sum must have all sites of the first: the difference would reveal the others",
            reason=Reason.COHORT_SHRANK,
        )
    confirmed = Confirmed(state, request.survivors)
    return confirmed, sign_confirmation(confirmed, enrolment)


def sign_confirmation(state: Confirmed, enrolment: Enrolment) -> Confirmation:
    """The confirmation of ``state``: the same bytes each time (Ed25519 is deterministic)."""
    payload = Confirmation.signed(state.before.announcement.context(), state.before.key_list, state.survivors)
    return Confirmation(enrolment.site, enrolment.key.sign(payload))
