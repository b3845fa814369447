"""Phase 1 at the site: may this sum be answered at all? Then two fresh keys, signed."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from medfl.client.secagg.contribution import Contribution
from medfl.client.secagg.enrolment import Enrolment, other_roster
from medfl.client.secagg.journal import History
from medfl.shared.errors import PolicyRefusal, ProtocolError
from medfl.shared.secagg.announcement import Announcement, Purpose
from medfl.shared.secagg.hashing import DIGEST_BYTES
from medfl.shared.secagg.limits import LARGEST_COHORT, threshold_of
from medfl.shared.secagg.messages import Advert
from medfl.shared.secagg.reasons import Reason


@dataclass(frozen=True, slots=True)
class Advertised:
    """The site after phase 1. ``must_survive``: sites without which a repeated sum would give another sum away."""

    announcement: Announcement
    context: bytes
    contribution: Contribution
    fingerprint: bytes  # of the contribution
    must_survive: frozenset[int]
    channel_key: X25519PrivateKey
    mask_key: X25519PrivateKey
    advert: Advert


def advertise_keys(
    announcement: Announcement, contribution: Contribution, enrolment: Enrolment, history: History
) -> Advertised:
    """Check ``announcement`` against this site's rules, its journal and what it holds, and make fresh keys.

    Raises:
        PolicyRefusal, ProtocolError: why this sum is not answered.
    """
    _check_cohort(announcement, enrolment)
    _check_content(announcement, contribution)
    fingerprint = contribution.fingerprint(history.key)
    must_survive = _check_history(announcement, contribution, fingerprint, enrolment, history)
    context = announcement.context()
    channel_key, mask_key = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    unsigned = Advert(
        enrolment.site, channel_key.public_key().public_bytes_raw(), mask_key.public_key().public_bytes_raw()
    )
    advert = Advert(
        unsigned.site, unsigned.channel_key, unsigned.mask_key, enrolment.key.sign(unsigned.signed(context))
    )
    return Advertised(announcement, context, contribution, fingerprint, must_survive, channel_key, mask_key, advert)


def _check_cohort(announcement: Announcement, enrolment: Enrolment) -> None:
    roster, cohort = enrolment.roster, announcement.cohort
    if announcement.roster != roster.digest:
        raise other_roster(f"epoch {roster.epoch}")
    if enrolment.site not in cohort or any(site not in roster.by_id for site in cohort):
        raise ProtocolError("the cohort lacks this site or has one outside the roster", reason=Reason.BAD_COHORT)
    if len(cohort) < enrolment.minimum_cohort:
        raise PolicyRefusal(
            f"{len(cohort)} sites would be summed, and this site demands at least {enrolment.minimum_cohort}",
            reason=Reason.COHORT_TOO_SMALL,
        )
    if not threshold_of(len(cohort)) <= announcement.threshold <= len(cohort) <= LARGEST_COHORT:
        raise PolicyRefusal(
            f"threshold {announcement.threshold} of {len(cohort)} sites is not allowed: it must be at least "
            f"{threshold_of(len(cohort))}",
            reason=Reason.THRESHOLD_TOO_LOW,
        )


def _check_content(announcement: Announcement, contribution: Contribution) -> None:
    if announcement.model != contribution.model:
        raise ProtocolError("the sum is about another model than the one trained here", reason=Reason.OTHER_MODEL)
    if (announcement.training, announcement.sent) != (contribution.training, contribution.sent):
        raise ProtocolError(
            "the sum is about another question than the one asked here: another round, or another vector beside the "
            "model. Sites that are asked different things could be told apart in their sum",
            reason=Reason.OTHER_MODEL,
        )
    encoding = contribution.encoding
    if (announcement.encoding, announcement.ring, announcement.length) != (
        encoding.digest,
        encoding.ring,
        encoding.length,
    ):
        raise ProtocolError("the sum is announced in another encoding than here", reason=Reason.OTHER_ENCODING)


def _check_history(
    announcement: Announcement,
    contribution: Contribution,
    fingerprint: bytes,
    enrolment: Enrolment,
    history: History,
) -> frozenset[int]:
    """Sites that must be among the survivors, when this sum repeats another."""
    if (announcement.round, announcement.attempt) <= history.last_seen or announcement.round <= history.last_consumed:
        raise PolicyRefusal(
            f"round {announcement.round} attempt {announcement.attempt} was answered before: a coordinator that "
            "restarts goes on with the next number",
            reason=Reason.REPLAYED,
        )
    ceiling = None if announcement.purpose is Purpose.EVALUATE else history.weight_ceiling
    if ceiling is not None and contribution.weight > ceiling:
        raise PolicyRefusal(
            f"weight {contribution.weight} is above the {ceiling} given before in this roster epoch",
            reason=Reason.WEIGHT_ROSE,
        )
    must_survive: set[int] = set()
    for earlier in history.repeated:
        before = set(struct.unpack(f"<{len(earlier.survivors) // 2}H", earlier.survivors))
        must_survive |= _check_repetition(announcement, before, earlier.contribution, fingerprint, enrolment)
    return frozenset(must_survive)


def _check_repetition(
    announcement: Announcement, before: set[int], earlier: bytes, fingerprint: bytes, enrolment: Enrolment
) -> set[int]:
    """Two sums of the same updates that differ by one site reveal that site; so the sites must stay the same.

    So do updates that are all but the same, of one round and models that differ by a hair. A sum of patient numbers may
    grow, because a site that joins late has to be counted.
    """
    now = set(announcement.cohort)
    if earlier == fingerprint and (now == before or (announcement.purpose is Purpose.SETUP and now > before)):
        return before
    if now < before:
        same_numbers = earlier[:DIGEST_BYTES] == fingerprint[:DIGEST_BYTES]  # however they are encoded
        if enrolment.rules.allow_shrunk_repeat and not same_numbers:
            return set()
        raise PolicyRefusal(
            f"this round or model was summed before over {len(before)} sites, and now over {len(now)} of them: the "
            "difference would reveal the others; this site's rules allow it only after retraining and with "
            "allow_shrunk_repeat",
            reason=Reason.COHORT_SHRANK,
        )
    raise PolicyRefusal(
        "an update of this round or model was summed before, with other sites or another update",
        reason=Reason.CONSUMED,
    )
