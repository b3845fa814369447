"""Phase 2 at the site: verify everybody's keys, then share the own two secrets among all, encrypted."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from medfl.client.secagg.advertise_keys import Advertised
from medfl.client.secagg.enrolment import Enrolment
from medfl.shared.errors import PolicyRefusal, ProtocolError
from medfl.shared.secagg.hashing import ids_to_bytes
from medfl.shared.secagg.masks import NONCE, agree, seed_commitment, share_cipher
from medfl.shared.secagg.messages import KeyList, SealedShares
from medfl.shared.secagg.reasons import Reason
from medfl.shared.secagg.shamir import split


@dataclass(frozen=True, slots=True)
class Shared:
    """The site after phase 2. Shares are pairs: of a site's mask key, and of its seed."""

    before: Advertised
    key_list: bytes  # digest
    sharing: tuple[int, ...]  # U1, ascending
    mask_keys: Mapping[int, bytes]  # public, of every site of U1
    channels: Mapping[int, bytes]  # agreed secrets, of every peer
    seed: bytes
    own_shares: tuple[bytes, bytes]


def share_keys(state: Advertised, request: KeyList, enrolment: Enrolment) -> tuple[Shared, SealedShares]:
    """Check the key list, draw a seed, and encrypt for each peer its share of the mask key and of the seed.

    Raises:
        ProtocolError: a key that is forged, of another round, altered or repeated.
        PolicyRefusal: too few sites.
    """
    me, context, key_list = enrolment.site, state.context, request.digest
    _check_keys(state, request, enrolment)
    sharing = tuple(advert.site for advert in request.adverts)
    check_size(len(sharing), state, enrolment)
    channels = {
        advert.site: agree(state.channel_key, advert.channel_key) for advert in request.adverts if advert.site != me
    }
    seed = secrets.token_bytes(32)
    points = [site + 1 for site in sharing]  # never 0, where the secret lies
    threshold = state.announcement.threshold
    shares = dict(
        zip(
            sharing,
            zip(
                split(state.mask_key.private_bytes_raw(), threshold, points),
                split(seed, threshold, points),
                strict=True,
            ),
            strict=True,
        )
    )
    sealed = []
    for peer, agreed in channels.items():
        cipher = share_cipher(agreed, context=context, sender=me, receiver=peer)
        bound_to = key_list + ids_to_bytes([me, peer])
        sealed.append((peer, cipher.encrypt(NONCE, b"".join(shares[peer]), bound_to)))
    unsigned = SealedShares(me, seed_commitment(seed, context=context, site=me), tuple(sealed))
    signature = enrolment.key.sign(unsigned.signed(context, key_list))
    after = Shared(
        before=state,
        key_list=key_list,
        sharing=sharing,
        mask_keys={advert.site: advert.mask_key for advert in request.adverts},
        channels=channels,
        seed=seed,
        own_shares=shares[me],
    )
    return after, SealedShares(me, unsigned.commitment, unsigned.sealed, signature)


def check_size(sites: int, state: Advertised, enrolment: Enrolment) -> None:
    """Raise PolicyRefusal when fewer sites are left than the threshold or this site's minimum."""
    least = max(state.announcement.threshold, enrolment.minimum_cohort)
    if sites < least:
        raise PolicyRefusal(f"{sites} sites are left, and at least {least} are needed", reason=Reason.COHORT_TOO_SMALL)


def _check_keys(state: Advertised, request: KeyList, enrolment: Enrolment) -> None:
    for advert in request.adverts:
        if advert.site not in state.announcement.cohort:
            raise ProtocolError("the key list has a site outside the cohort", reason=Reason.BAD_KEYS)
        enrolment.roster.check_signature(advert.site, advert.signature, advert.signed(state.context))
    if state.advert not in request.adverts:
        raise ProtocolError("the key list lacks this site's own keys or has altered them", reason=Reason.BAD_KEYS)
    keys = [key for advert in request.adverts for key in (advert.channel_key, advert.mask_key)]
    if len(set(keys)) != len(keys):
        raise ProtocolError("the key list has one key twice", reason=Reason.BAD_KEYS)
