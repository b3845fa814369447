"""The messages of the five phases after the announcement: bytes <-> dataclasses, and what each signature covers.

Every request begins with the 32-byte context. Lists rise by site id, so that a message has one form only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from medfl.shared.secagg.hashing import DIGEST_BYTES, ids_to_bytes, tagged_hash
from medfl.shared.secagg.limits import LARGEST_COHORT
from medfl.shared.secagg.shamir import SHARE_BYTES
from medfl.shared.secagg.wire import Reader, ascending

KEY_BYTES, SIGNATURE_BYTES = 32, 64
CIPHERTEXT_BYTES = 2 * SHARE_BYTES + 16  # two shares and the authentication tag


@dataclass(frozen=True, slots=True)
class Advert:
    """Site to coordinator, advertise_keys: two fresh X25519 public keys, signed. 130 bytes."""

    site: int
    channel_key: bytes  # for sending shares
    mask_key: bytes  # for pair masks
    signature: bytes = b""

    @property
    def body(self) -> bytes:
        """Everything but the signature."""
        return ids_to_bytes([self.site]) + self.channel_key + self.mask_key

    def signed(self, context: bytes) -> bytes:
        """What the signature covers."""
        return tagged_hash(b"adv", context, self.body)

    def to_bytes(self) -> bytes:
        """The message."""
        return self.body + self.signature

    @classmethod
    def parse(cls, data: bytes) -> Advert:
        """Raises ProtocolError when malformed."""
        reader = Reader(data, "a site's keys")
        advert = cls._read(reader)
        reader.end()
        return advert

    @classmethod
    def _read(cls, reader: Reader) -> Advert:
        return cls(reader.number("H"), reader.take(KEY_BYTES), reader.take(KEY_BYTES), reader.take(SIGNATURE_BYTES))


@dataclass(frozen=True, slots=True)
class KeyList:
    """Coordinator to site, share_keys: the adverts of all sites that are still there."""

    context: bytes
    adverts: tuple[Advert, ...]

    @property
    def digest(self) -> bytes:
        """Hash that fixes who holds which keys; in every later signature and share."""
        return tagged_hash(b"U1", self.context, *[advert.to_bytes() for advert in self.adverts])

    def to_bytes(self) -> bytes:
        """The message."""
        return self.context + struct.pack("<H", len(self.adverts)) + b"".join(a.to_bytes() for a in self.adverts)

    @classmethod
    def parse(cls, data: bytes) -> KeyList:
        """Raises ProtocolError when malformed."""
        reader = Reader(data, "a list of keys")
        context = reader.take(DIGEST_BYTES)
        adverts = tuple(Advert._read(reader) for _ in range(_count(reader)))
        _check_order(reader, (advert.site for advert in adverts))
        return cls(context, adverts)


@dataclass(frozen=True, slots=True)
class SealedShares:
    """Site to coordinator, share_keys: for each peer its two shares, encrypted, and a commitment to the own seed."""

    site: int
    commitment: bytes
    sealed: tuple[tuple[int, bytes], ...]  # receiver, ciphertext
    signature: bytes = b""

    @property
    def body(self) -> bytes:
        """Everything but the signature."""
        return ids_to_bytes([self.site]) + self.commitment + _pairs(self.sealed)

    def signed(self, context: bytes, key_list: bytes) -> bytes:
        """What the signature covers."""
        return tagged_hash(b"share", context, key_list, self.body)

    def to_bytes(self) -> bytes:
        """The message."""
        return self.body + self.signature

    @classmethod
    def parse(cls, data: bytes) -> SealedShares:
        """Raises ProtocolError when malformed."""
        reader = Reader(data, "a site's shares")
        site, commitment = reader.number("H"), reader.take(DIGEST_BYTES)
        sealed = _read_pairs(reader, CIPHERTEXT_BYTES)
        signature = reader.take(SIGNATURE_BYTES)
        _check_order(reader, (receiver for receiver, _ in sealed))
        return cls(site, commitment, sealed, signature)


@dataclass(frozen=True, slots=True)
class ShareDelivery:
    """Coordinator to site, masked_input: what the peers encrypted for it."""

    context: bytes
    sealed: tuple[tuple[int, bytes], ...]  # sender, ciphertext

    def to_bytes(self) -> bytes:
        """The message."""
        return self.context + struct.pack("<H", len(self.sealed)) + _pairs(self.sealed)

    @classmethod
    def parse(cls, data: bytes) -> ShareDelivery:
        """Raises ProtocolError when malformed."""
        reader = Reader(data, "a delivery of shares")
        context = reader.take(DIGEST_BYTES)
        sealed = tuple((reader.number("H"), reader.take(CIPHERTEXT_BYTES)) for _ in range(_count(reader)))
        _check_order(reader, (sender for sender, _ in sealed))
        return cls(context, sealed)


@dataclass(frozen=True, slots=True)
class MaskedHeader:
    """Site to coordinator, masked_input: whose shares it holds; beside it travel the masked vector and scalars."""

    site: int
    sharers: tuple[int, ...]  # U2, itself included
    signature: bytes = b""

    @property
    def body(self) -> bytes:
        """Everything but the signature."""
        return ids_to_bytes([self.site, *self.sharers])

    def signed(self, context: bytes, key_list: bytes, vector_digest: bytes, scalars: bytes) -> bytes:
        """What the signature covers: ``vector_digest`` is SHA-256 of the vector as it travels."""
        return tagged_hash(b"masked", context, key_list, self.body, vector_digest, scalars)

    def to_bytes(self) -> bytes:
        """The message."""
        return self.body + self.signature

    @classmethod
    def parse(cls, data: bytes) -> MaskedHeader:
        """Raises ProtocolError when malformed."""
        reader = Reader(data, "a masked input")
        site = reader.number("H")
        size = reader.left - SIGNATURE_BYTES
        if size < 0 or size % 2 or size // 2 > LARGEST_COHORT:
            raise reader.error("has a wrong size")
        sharers = tuple(reader.number("H") for _ in range(size // 2))
        signature = reader.take(SIGNATURE_BYTES)
        _check_order(reader, sharers)
        return cls(site, sharers, signature)


@dataclass(frozen=True, slots=True)
class SurvivorList:
    """Coordinator to site, confirm_survivors: whose vectors are in the sum."""

    context: bytes
    survivors: tuple[int, ...]  # U3

    def to_bytes(self) -> bytes:
        """The message."""
        return self.context + struct.pack("<H", len(self.survivors)) + ids_to_bytes(self.survivors)

    @classmethod
    def parse(cls, data: bytes) -> SurvivorList:
        """Raises ProtocolError when malformed."""
        reader = Reader(data, "a list of survivors")
        context = reader.take(DIGEST_BYTES)
        survivors = tuple(reader.number("H") for _ in range(_count(reader)))
        _check_order(reader, survivors)
        return cls(context, survivors)


@dataclass(frozen=True, slots=True)
class Confirmation:
    """Site to coordinator, confirm_survivors: its signature under the one survivor list it accepts. 66 bytes."""

    site: int
    signature: bytes

    @staticmethod
    def signed(context: bytes, key_list: bytes, survivors: Iterable[int]) -> bytes:
        """What the signature covers."""
        return tagged_hash(b"U3", context, key_list, ids_to_bytes(survivors))

    def to_bytes(self) -> bytes:
        """The message."""
        return ids_to_bytes([self.site]) + self.signature

    @classmethod
    def parse(cls, data: bytes) -> Confirmation:
        """Raises ProtocolError when malformed."""
        reader = Reader(data, "a confirmation")
        confirmation = cls(reader.number("H"), reader.take(SIGNATURE_BYTES))
        reader.end()
        return confirmation


@dataclass(frozen=True, slots=True)
class ConfirmationList:
    """Coordinator to site, unmask: who confirmed the survivors."""

    context: bytes
    confirmations: tuple[Confirmation, ...]

    def to_bytes(self) -> bytes:
        """The message."""
        size = struct.pack("<H", len(self.confirmations))
        return self.context + size + b"".join(c.to_bytes() for c in self.confirmations)

    @classmethod
    def parse(cls, data: bytes) -> ConfirmationList:
        """Raises ProtocolError when malformed."""
        reader = Reader(data, "a list of confirmations")
        context = reader.take(DIGEST_BYTES)
        confirmations = tuple(
            Confirmation(reader.number("H"), reader.take(SIGNATURE_BYTES)) for _ in range(_count(reader))
        )
        _check_order(reader, (confirmation.site for confirmation in confirmations))
        return cls(context, confirmations)


@dataclass(frozen=True, slots=True)
class Reveal:
    """Site to coordinator, unmask: one share for each sharer: of its seed where it survived, else of its mask key."""

    site: int
    shares: tuple[tuple[int, bytes], ...]  # owner, share
    signature: bytes = b""

    @property
    def body(self) -> bytes:
        """Everything but the signature."""
        return ids_to_bytes([self.site]) + _pairs(self.shares)

    def signed(self, context: bytes, key_list: bytes) -> bytes:
        """What the signature covers."""
        return tagged_hash(b"reveal", context, key_list, self.body)

    def to_bytes(self) -> bytes:
        """The message."""
        return self.body + self.signature

    @classmethod
    def parse(cls, data: bytes) -> Reveal:
        """Raises ProtocolError when malformed."""
        reader = Reader(data, "a reveal")
        site = reader.number("H")
        shares = _read_pairs(reader, SHARE_BYTES)
        signature = reader.take(SIGNATURE_BYTES)
        _check_order(reader, (owner for owner, _ in shares))
        return cls(site, shares, signature)


def _pairs(pairs: Iterable[tuple[int, bytes]]) -> bytes:
    return b"".join(ids_to_bytes([site]) + content for site, content in pairs)


def _read_pairs(reader: Reader, size: int) -> tuple[tuple[int, bytes], ...]:
    """As many pairs of id and ``size`` bytes as stand before the signature."""
    count, rest = divmod(reader.left - SIGNATURE_BYTES, 2 + size)
    if rest or not 0 <= count <= LARGEST_COHORT:
        raise reader.error("has a wrong size")
    return tuple((reader.number("H"), reader.take(size)) for _ in range(count))


def _count(reader: Reader) -> int:
    count = reader.number("H")
    if count > LARGEST_COHORT:
        raise reader.error("names too many sites")
    return count


def _check_order(reader: Reader, ids: Iterable[int]) -> None:
    reader.end()
    if not ascending(tuple(ids)):
        raise reader.error("names a site twice or out of order")
