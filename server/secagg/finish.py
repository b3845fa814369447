"""The last two phases of a sum whose survivors are fixed, and its decoding; also after the coordinator's restart."""

from __future__ import annotations

from collections.abc import Mapping

from medfl.server.secagg import confirm_survivors, unmask
from medfl.server.secagg.collect import collect
from medfl.server.secagg.outcome import SecureSum, SumVoid
from medfl.server.secagg.pending import PendingSum
from medfl.shared.errors import ProtocolError
from medfl.shared.secagg.encoding import CLIPPED, WEIGHT, decode_mean, decode_scalars
from medfl.shared.secagg.exchange import Exchange, Phase, PhaseReply, SiteRefusal
from medfl.shared.secagg.messages import Confirmation, Reveal
from medfl.shared.secagg.prg import usable_threads
from medfl.shared.secagg.roster import Roster

_TRIES = 2


def finish(
    pending: PendingSum,
    *,
    roster: Roster,
    exchange: Exchange,
    threads: int | None = None,
    earlier: Mapping[int, SiteRefusal] | None = None,
) -> SecureSum:
    """Have the survivors confirmed and unmasked, and decode. ``pending.vector`` is decoded in place and lost.

    Both phases are repeated once where too few replied: sites answer the same survivors with the same bytes.

    Raises:
        SumVoid: fewer than the threshold finished (``store.pending`` may be tried again later), or their shares do
            not open, or the sum is out of range.
    """
    refusals = dict(earlier or {})

    def void(message: str, culprits: tuple[int, ...] = ()) -> SumVoid:
        return SumVoid(message, confirmed=True, survivors=pending.survivors, refusals=refusals, culprits=culprits)

    for _ in range(_TRIES):
        reveals = _reveals(pending, roster, exchange, refusals)
        if len(reveals) < pending.announcement.threshold:
            continue
        try:
            masks = unmask.open_masks(pending, reveals.values())
            unmask.take_off(pending, masks, threads=usable_threads() if threads is None else threads)
            return _decode(pending, refusals)
        except unmask.BadDealer as bad:
            raise void(str(bad), bad.sites) from None
        except ProtocolError as error:
            raise void(str(error)) from None
    raise void(
        f"the masked sum could not be opened: fewer than {pending.announcement.threshold} of its "
        f"{len(pending.survivors)} sites finished"
    )


def _reveals(
    pending: PendingSum, roster: Roster, exchange: Exchange, refusals: dict[int, SiteRefusal]
) -> dict[int, Reveal]:
    """Both phases once. Empty when too few confirmed."""

    def confirm(site: int, reply: PhaseReply) -> Confirmation:
        return confirm_survivors.accept(pending, roster, site, reply)

    def reveal(site: int, reply: PhaseReply) -> Reveal:
        return unmask.accept(pending, roster, site, reply)

    requests = confirm_survivors.requests(pending)
    confirmations = collect(exchange, Phase.CONFIRM_SURVIVORS, requests, confirm, refusals)
    if len(confirmations) < pending.announcement.threshold:
        return {}
    return collect(exchange, Phase.UNMASK, unmask.requests(pending, confirmations), reveal, refusals)


def _decode(pending: PendingSum, refusals: Mapping[int, SiteRefusal]) -> SecureSum:
    scalars = decode_scalars(pending.scalars, pending.encoding)
    weight, clipped = scalars.pop(WEIGHT), scalars.pop(CLIPPED)
    mean = decode_mean(pending.vector, pending.encoding, weight=weight, terms=len(pending.survivors))
    attempts = pending.announcement.attempt + 1
    return SecureSum(mean, weight, scalars, clipped, pending.survivors, attempts, dict(refusals))
