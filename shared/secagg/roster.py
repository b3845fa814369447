"""Who belongs to the consortium: site ids, names and Ed25519 keys, the same at every site, and their common hash."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medfl.shared.errors import ConfigError, ProtocolError
from medfl.shared.keys import fingerprint
from medfl.shared.secagg.hashing import ids_to_bytes, tagged_hash
from medfl.shared.secagg.limits import LARGEST_COHORT, SMALLEST_COHORT, default_minimum_cohort
from medfl.shared.secagg.reasons import Reason

LARGEST_ID = 65534


@dataclass(frozen=True)
class Member:
    """One site of the consortium. ``key``: 32 raw bytes of its Ed25519 public key."""

    id: int
    name: str
    key: bytes

    @property
    def fingerprint(self) -> str:
        """``SHA256:...`` of the key, as ``ssh-keygen -lf`` prints it: what two people compare by telephone."""
        return fingerprint(Ed25519PublicKey.from_public_bytes(self.key))


@dataclass(frozen=True)
class Roster:
    """One epoch of the consortium. Built by :func:`make_roster`, which checks it."""

    consortium: str
    epoch: int  # rises with every change
    minimum_cohort: int
    members: tuple[Member, ...]  # in order of id

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over everything a roster says: 32 bytes. Part of the context of every secure sum."""
        return tagged_hash(
            b"roster",
            self.consortium.encode(),
            struct.pack("<IH", self.epoch, self.minimum_cohort),
            *[ids_to_bytes([member.id]) + member.key + member.name.encode() for member in self.members],
        )

    @cached_property
    def by_id(self) -> dict[int, Member]:
        """Members by their id."""
        return {member.id: member for member in self.members}

    def name(self, site: int) -> str:
        """The site's name, or its number where the roster does not know it."""
        return self.by_id[site].name if site in self.by_id else f"site {site}"

    def check_signature(self, site: int, signature: bytes, message: bytes) -> None:
        """Return when ``signature`` over ``message`` was made with the key that the roster has for ``site``.

        Raises:
            ProtocolError: it was not, or the roster has no such site.
        """
        member = self.by_id.get(site)
        if member is None:
            raise ProtocolError(f"site {site} is not in the roster", reason=Reason.BAD_SIGNATURE)
        try:
            Ed25519PublicKey.from_public_bytes(member.key).verify(signature, message)
        except InvalidSignature:
            raise ProtocolError(
                f"a message in the name of {member.name} is not signed with its key: somebody else wrote it, or it "
                "belongs to another round",
                reason=Reason.BAD_SIGNATURE,
            ) from None


def make_roster(consortium: str, epoch: int, members: Iterable[Member], *, minimum_cohort: int | None = None) -> Roster:
    """A checked roster; ``minimum_cohort`` follows from its size when absent.

    Raises:
        ConfigError: an id, a name or a key stands there twice, or is impossible.
    """
    ordered = tuple(sorted(members, key=lambda member: member.id))
    for what in ("id", "name", "key"):
        if len({getattr(member, what) for member in ordered}) != len(ordered):
            raise ConfigError(f"roster: two sites have the same {what}: each site needs its own")
    if not all(1 <= member.id <= LARGEST_ID and len(member.key) == 32 for member in ordered):
        raise ConfigError(f"roster: a site's id must lie between 1 and {LARGEST_ID} and its key have 32 bytes")
    minimum = default_minimum_cohort(len(ordered)) if minimum_cohort is None else minimum_cohort
    if not SMALLEST_COHORT <= minimum <= LARGEST_COHORT:
        raise ConfigError(f"roster: minimum_cohort must lie between {SMALLEST_COHORT} and {LARGEST_COHORT}")
    return Roster(consortium, epoch, minimum, ordered)
