"""Phase 5 at the coordinator: collect shares, open the secrets, take the masks off the sum."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from medfl.server.secagg.pending import PendingSum
from medfl.shared.errors import ProtocolError
from medfl.shared.secagg.exchange import PhaseReply, PhaseRequest
from medfl.shared.secagg.masks import agree, pair_mask, seed_commitment, self_mask
from medfl.shared.secagg.messages import Confirmation, ConfirmationList, Reveal
from medfl.shared.secagg.prg import Mask, add_masks, add_scalar_masks
from medfl.shared.secagg.roster import Roster
from medfl.shared.secagg.shamir import join, weights_at_zero


class BadDealer(ProtocolError):
    """The shares that ``sites`` dealt do not open what they had committed to."""

    def __init__(self, sites: tuple[int, ...]) -> None:
        super().__init__(
            f"the shares dealt by site {', '.join(map(str, sites))} do not open its secret: this sum is lost; leave "
            "that site out, have its release checked, and train this round again",
            reason="bad dealer",
        )
        self.sites = sites


def requests(pending: PendingSum, confirmations: Mapping[int, Confirmation]) -> dict[int, PhaseRequest]:
    """All confirmations for every site that confirmed."""
    ordered = tuple(confirmation for _, confirmation in sorted(confirmations.items()))
    return dict.fromkeys(confirmations, PhaseRequest(ConfirmationList(pending.context, ordered).to_bytes()))


def accept(pending: PendingSum, roster: Roster, site: int, reply: PhaseReply) -> Reveal:
    """The shares in ``reply``. Raises ProtocolError unless ``site`` signed them and there is one for each sharer."""
    reveal = Reveal.parse(reply.control)
    if reveal.site != site or tuple(owner for owner, _ in reveal.shares) != pending.sharers:
        raise ProtocolError("a site answered in another's name, or not with one share for each sharer")
    roster.check_signature(site, reveal.signature, reveal.signed(pending.context, pending.key_list_digest))
    return reveal


def open_masks(pending: PendingSum, reveals: Collection[Reveal]) -> list[Mask]:
    """The masks that take every mask off the sum.

    Needs ``threshold`` reveals; with more, single wrong shares are passed over.

    Raises:
        BadDealer: a site's shares open neither its seed nor its mask key.
    """
    given = {reveal.site: dict(reveal.shares) for reveal in reveals}
    weights: dict[tuple[int, ...], list[int]] = {}  # of each window when it is first needed: nearly always one
    masks: list[Mask] = []
    bad: list[int] = []
    for owner in pending.sharers:
        for window in _windows(given, pending):
            if window not in weights:
                weights[window] = weights_at_zero([site + 1 for site in window])
            opened = _open_one(pending, owner, [given[site][owner] for site in window], weights[window])
            if opened is not None:
                masks += opened
                break
        else:
            bad.append(owner)
    if bad:
        raise BadDealer(tuple(bad))
    return masks


def take_off(pending: PendingSum, masks: list[Mask], *, threads: int = 1) -> None:
    """Unmask ``pending.vector`` and ``pending.scalars`` in place."""
    add_masks(pending.vector, masks, threads=threads)
    add_scalar_masks(pending.scalars, masks)


def _windows(given: Mapping[int, object], pending: PendingSum) -> Iterator[tuple[int, ...]]:
    """Sets of threshold sites: one when there are no more, else enough that each single site is missing from one."""
    sites, size = sorted(given), pending.announcement.threshold
    starts = len(sites) if len(sites) > size else 1
    for start in range(starts):
        yield tuple(sorted((sites + sites)[start : start + size]))


def _open_one(pending: PendingSum, owner: int, shares: list[bytes], weights: list[int]) -> list[Mask] | None:
    """Masks that cancel what ``owner`` left in the sum, or None when the shares do not fit its commitment or key."""
    context = pending.context
    try:
        secret = join(weights, shares)
    except ProtocolError:
        return None
    if owner in pending.survivors:
        if seed_commitment(secret, context=context, site=owner) != pending.commitments[owner]:
            return None
        return [self_mask(secret, context=context, site=owner).inverted()]
    key = X25519PrivateKey.from_private_bytes(secret)
    public = {advert.site: advert.mask_key for advert in pending.key_list.adverts}
    if key.public_key().public_bytes_raw() != public[owner]:
        return None
    return [
        pair_mask(agree(key, public[peer]), context=context, site=peer, peer=owner).inverted()
        for peer in pending.survivors
    ]
