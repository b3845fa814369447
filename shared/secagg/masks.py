"""Keys of masks and shares, derived in one place for the site that masks and the coordinator that unmasks."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from medfl.shared.errors import ProtocolError
from medfl.shared.secagg.hashing import derive_key, ids_to_bytes, tagged_hash
from medfl.shared.secagg.prg import Mask
from medfl.shared.secagg.reasons import Reason


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """X25519 of a private key and another site's 32 public bytes.

    Raises:
        ProtocolError: the public key is one of the few that give everybody the same secret.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ProtocolError("a site's public key is of low order: it hides nothing", reason=Reason.BAD_KEYS) from None


def self_mask(seed: bytes, *, context: bytes, site: int) -> Mask:
    """The mask of ``site`` that only its seed gives; the site adds it."""
    return Mask(derive_key(seed, context=context, purpose=b"self" + ids_to_bytes([site])))


def seed_commitment(seed: bytes, *, context: bytes, site: int) -> bytes:
    """What a site publishes of its seed, so that wrong shares of it are noticed and laid at its door."""
    return tagged_hash(b"bcommit", context, ids_to_bytes([site]), seed)


def pair_mask(agreed: bytes, *, context: bytes, site: int, peer: int) -> Mask:
    """The mask that ``site`` applies for ``peer``: added by the smaller id, taken away by the larger."""
    purpose = b"mask" + ids_to_bytes([min(site, peer), max(site, peer)])
    return Mask(derive_key(agreed, context=context, purpose=purpose), subtract=site > peer)


def share_cipher(agreed: bytes, *, context: bytes, sender: int, receiver: int) -> ChaCha20Poly1305:
    """Cipher for the one message of shares from ``sender`` to ``receiver``; each key encrypts once, with nonce zero."""
    return ChaCha20Poly1305(derive_key(agreed, context=context, purpose=b"chan" + ids_to_bytes([sender, receiver])))


NONCE = bytes(12)
