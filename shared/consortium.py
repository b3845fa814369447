"""Who belongs to the consortium, as the document that its coordinator signs: sites, keys, addresses, and an epoch.

The epoch rises with every change and never goes back. ``floor`` is the epoch of the last change that took something
away (a site revoked, a key replaced): from then on no roster before it may be used for a secure sum. A roster that
only grew leaves the one before it usable until every administrator has confirmed the new keys.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cached_property
from typing import Annotated, Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AfterValidator, Field, ValidationError, model_validator

from medfl.shared.addresses import ADDRESS
from medfl.shared.config import Settings
from medfl.shared.errors import ConfigError, ProtocolError
from medfl.shared.keys import fingerprint, node_public_key, public_line, read_public_key
from medfl.shared.secagg.limits import LARGEST_COHORT, SMALLEST_COHORT
from medfl.shared.secagg.roster import LARGEST_ID, Member, Roster, make_roster
from medfl.shared.signing import Document, Signed, parse_signing_key, sign

SITE_NAME = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"


def _site_key(line: str) -> str:
    try:
        key = read_public_key(line)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("is not an Ed25519 key")
    return public_line(key)


def _node_key(line: str) -> str:
    try:
        node_public_key(line)
        return public_line(read_public_key(line))
    except ConfigError as error:
        raise ValueError(str(error)) from None


class Site(Settings):
    """One site of the consortium. Keys are the one line of a .pub file, without its comment."""

    id: int = Field(ge=1, le=LARGEST_ID)  # in secure sums; stays with the name for good
    name: str = Field(pattern=SITE_NAME)
    site_key: Annotated[str, AfterValidator(_site_key)]
    node_key: Annotated[str, AfterValidator(_node_key)]

    @property
    def signer(self) -> Ed25519PublicKey:
        """The site key."""
        return parse_signing_key(self.site_key)

    @property
    def fingerprint(self) -> str:
        """``SHA256:...`` of the site key: the one thing that is read over the telephone for a site."""
        return fingerprint(self.signer)


class Membership(Settings):
    """One epoch of the consortium."""

    consortium: str = Field(min_length=1, max_length=200)
    epoch: int = Field(ge=1, lt=2**32)
    floor: int = Field(ge=1, lt=2**32)
    coordinator: str = Field(pattern=ADDRESS)  # where sites dial; its port is checked when it is signed
    minimum_cohort: int | None = Field(default=None, ge=SMALLEST_COHORT, le=LARGEST_COHORT)  # None: by its size
    next_id: int = Field(ge=1, le=LARGEST_ID + 1)  # no id is given twice
    sites: tuple[Site, ...] = Field(default=(), max_length=10_000)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.floor > self.epoch:
            raise ValueError("floor lies above epoch")
        if any(site.id >= self.next_id for site in self.sites):
            raise ValueError("a site's id lies above next_id")
        if len({site.node_key for site in self.sites}) != len(self.sites):
            raise ValueError("two sites have the same node key: each site needs its own")
        try:
            self.roster  # noqa: B018 - checks ids, names and keys
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @cached_property
    def roster(self) -> Roster:
        """The part of it that secure sums are bound to."""
        members = [Member(site.id, site.name, site.signer.public_bytes_raw()) for site in self.sites]
        return make_roster(self.consortium, self.epoch, members, minimum_cohort=self.minimum_cohort)

    @property
    def by_name(self) -> dict[str, Site]:
        """Sites by their names."""
        return {site.name: site for site in self.sites}

    @property
    def fingerprint(self) -> str:
        """``SHA256:...`` over all ids, names and site keys: equal at two sites that see the same roster."""
        return _short(self.roster.digest)

    def signed(self, key: Ed25519PrivateKey) -> Signed:
        """With the consortium's signature."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()
        return sign(key, Document.ROSTER, content)

    @classmethod
    def verified(cls, signed: Signed, key: Ed25519PublicKey) -> Membership:
        """Read ``signed``, once it is known to be signed with ``key``.

        Raises:
            SignatureRefused: it is not. ProtocolError: what was signed is not a roster of this release.
        """
        try:
            return cls.model_validate_json(signed.content(key, Document.ROSTER))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ProtocolError(f"the signed roster cannot be used: {first['msg']}") from None


def consortium_fingerprint(authority: x509.Certificate, key: Ed25519PublicKey) -> str:
    """``SHA256:...`` over the authority's certificate and the signing key: what a joining site hears by telephone."""
    der = authority.public_bytes(serialization.Encoding.DER)
    return _short(
        hashlib.sha256(b"MedFL consortium\0" + hashlib.sha256(der).digest() + key.public_bytes_raw()).digest()
    )


def _short(digest: bytes) -> str:
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
