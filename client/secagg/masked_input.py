"""Phase 3 at the site: open the peers' shares, encode the update, and put the masks on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag

from medfl.client.secagg.enrolment import Enrolment
from medfl.client.secagg.share_keys import Shared, check_size
from medfl.shared.errors import ProtocolError
from medfl.shared.secagg.announcement import Announcement
from medfl.shared.secagg.exchange import PhaseReply
from medfl.shared.secagg.hashing import ids_to_bytes
from medfl.shared.secagg.masks import NONCE, agree, pair_mask, self_mask, share_cipher
from medfl.shared.secagg.messages import MaskedHeader, ShareDelivery
from medfl.shared.secagg.prg import Mask, add_masks, add_scalar_masks
from medfl.shared.secagg.reasons import Reason
from medfl.shared.secagg.shamir import SHARE_BYTES


@dataclass(frozen=True, slots=True)
class Masked:
    """The site after phase 3: all it needs for the last two, and nothing that would unmask its own vector."""

    announcement: Announcement
    key_list: bytes  # digest
    must_survive: frozenset[int]
    contribution: bytes  # fingerprint
    shares: Mapping[int, tuple[bytes, bytes]]  # of each sharer: of its mask key, of its seed

    @property
    def sharers(self) -> tuple[int, ...]:
        """U2, ascending."""
        return tuple(sorted(self.shares))


def masked_input(
    state: Shared, request: ShareDelivery, enrolment: Enrolment, *, threads: int = 1
) -> tuple[Masked, PhaseReply]:
    """Open every share, then encode the held update and mask it.

    Raises:
        ProtocolError: a share was altered, comes from a stranger, or was made for another key list.
        PolicyRefusal: too few sites.
        TrainingError: the update is not finite.
    """
    me, before = enrolment.site, state.before
    shares = _open(state, request, me)
    check_size(len(shares), before, enrolment)
    masks = _masks(state, shares, me)
    encoded = before.contribution.encode()
    add_masks(encoded.vector, masks, threads=threads)
    add_scalar_masks(encoded.scalars, masks)
    wire = before.announcement.ring.pack(encoded.vector)
    unsigned = MaskedHeader(me, tuple(sorted(shares)))
    vector_digest, scalars = hashlib.sha256(wire.data).digest(), encoded.scalars.tobytes()
    signature = enrolment.key.sign(unsigned.signed(before.context, state.key_list, vector_digest, scalars))
    after = Masked(
        announcement=before.announcement,
        key_list=state.key_list,
        must_survive=before.must_survive,
        contribution=before.fingerprint,
        shares=shares,
    )
    header = MaskedHeader(me, unsigned.sharers, signature)
    return after, PhaseReply(header.to_bytes(), wire, encoded.scalars)


def _open(state: Shared, request: ShareDelivery, me: int) -> dict[int, tuple[bytes, bytes]]:
    shares = {me: state.own_shares}
    for sender, sealed in request.sealed:
        if sender not in state.channels:
            raise ProtocolError("shares come from a site that is not in the key list", reason=Reason.BAD_SHARES)
        cipher = share_cipher(state.channels[sender], context=state.before.context, sender=sender, receiver=me)
        try:
            plain = cipher.decrypt(NONCE, sealed, state.key_list + ids_to_bytes([sender, me]))
        except InvalidTag:
            raise ProtocolError(
                f"the shares of site {sender} were altered, or that site was shown another key list",
                reason=Reason.BAD_SHARES,
            ) from None
        shares[sender] = (plain[:SHARE_BYTES], plain[SHARE_BYTES:])
    return shares


def _masks(state: Shared, sharers: Mapping[int, object], me: int) -> list[Mask]:
    context = state.before.context
    masks = [self_mask(state.seed, context=context, site=me)]
    for peer in sharers:
        if peer != me:
            agreed = agree(state.before.mask_key, state.mask_keys[peer])
            masks.append(pair_mask(agreed, context=context, site=me, peer=peer))
    return masks
