"""The signing key of the tests' consortium, and studies under it."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfl.shared.messages import StudyOffer
from medfl.shared.signing import Document, Signed, sign
from medfl.shared.study import Study

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def signature_of(study: Study) -> bytes:
    """The consortium's signature of ``study``."""
    return sign(KEY, Document.STUDY, study.canonical()).signature


def offer_of(study: Study) -> StudyOffer:
    """``study`` as the coordinator offers it."""
    return StudyOffer(study.digest, study.canonical(), signature_of(study))


def verify(signed: Signed) -> bytes:
    """What a site that has pinned :data:`KEY` does."""
    return signed.content(KEY.public_key(), Document.STUDY)
