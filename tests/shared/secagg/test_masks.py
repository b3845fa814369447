"""Keys of masks and shares: published answers where there are any, else ones worked out with hmac and hashlib alone."""

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from medfl.shared.secagg.masks import NONCE, agree, pair_mask, seed_commitment, self_mask, share_cipher

KEY, CONTEXT = bytes(range(32)), b"\1" * 32


def test_two_sites_agree_on_the_secret_of_rfc_7748() -> None:
    # Section 6.1: Bob's private key, Alice's public key, their secret
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    agreed = agree(X25519PrivateKey.from_private_bytes(bob), alice)
    assert agreed.hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


def test_the_masks_of_a_known_seed_and_of_a_known_secret_are_known() -> None:
    own = self_mask(KEY, context=CONTEXT, site=7)
    assert (own.key.hex()[:32], own.subtract) == ("c89c023433ab8a87a7732294de7c0f32", False)
    smaller, larger = (pair_mask(KEY, context=CONTEXT, site=a, peer=b) for a, b in ((3, 300), (300, 3)))
    assert smaller.key.hex()[:32] == "e29c7fef35ab30c9eed670c213100339"
    assert (smaller.key, smaller.subtract, larger.subtract) == (larger.key, False, True)


def test_the_commitment_to_a_known_seed_is_known() -> None:
    commitment = seed_commitment(KEY, context=CONTEXT, site=7)
    assert commitment.hex() == "67750041cdb0766c113284f10d39f4691a17a321b111a9f1490cf2501a917fcb"


def test_shares_sealed_with_a_known_secret_are_known_and_open_for_their_receiver_only() -> None:
    # ChaCha20-Poly1305 of RFC 8439, computed apart from this code
    sealed = share_cipher(KEY, context=CONTEXT, sender=3, receiver=300).encrypt(NONCE, b"two shares", b"h1")
    assert sealed.hex() == "75a611ad5fac3a5e0792fdce7837cbd530d3f70e5da13070ee12"
    for sender, receiver, context in ((300, 3, CONTEXT), (3, 301, CONTEXT), (3, 300, bytes(32))):
        with pytest.raises(InvalidTag):
            share_cipher(KEY, context=context, sender=sender, receiver=receiver).decrypt(NONCE, sealed, b"h1")
