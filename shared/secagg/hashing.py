"""Hashing, key derivation and id lists of MSA-1: every use has its own tag, and no two inputs look alike."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_DOMAIN = b"MedFL-SecAgg/1 "

DIGEST_BYTES = 32


def tagged_hash(tag: bytes, *parts: bytes) -> bytes:
    """SHA-256 over the domain, ``tag`` and each part with its length before it: 32 bytes.

    The lengths make it injective: ``("ab", "c")`` and ``("a", "bc")`` are different inputs.
    """
    digest = hashlib.sha256(_DOMAIN + tag)
    for part in parts:
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.digest()


def derive_key(secret: bytes, *, context: bytes, purpose: bytes) -> bytes:
    """A 32-byte key for one ``purpose`` within one ``context`` (HKDF-SHA256, RFC 5869)."""
    return HKDF(hashes.SHA256(), DIGEST_BYTES, context, _DOMAIN + purpose).derive(secret)


def ids_to_bytes(ids: Iterable[int]) -> bytes:
    """Site ids as consecutive little-endian u16."""
    return b"".join(struct.pack("<H", site) for site in ids)
