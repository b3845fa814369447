"""The signed roster: what it must hold, and what two sites compare of it."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from medfl.shared.consortium import Membership, Site
from medfl.shared.errors import ProtocolError
from medfl.shared.keys import fingerprint, public_line
from medfl.shared.signing import Document, SignatureRefused, Signed, sign

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
NODE_KEYS = [public_line(ec.derive_private_key(number, ec.SECP384R1()).public_key()) for number in (1, 2, 3)]


def site(number: int, name: str, **changes: Any) -> Site:
    key = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32).public_key()
    fields = {"id": number, "name": name, "site_key": public_line(key), "node_key": NODE_KEYS[number - 1]}
    return Site.model_validate(fields | changes)


SITES = (site(1, "north"), site(2, "south"), site(3, "west"))


def membership(**changes: Any) -> Membership:
    fields = {"consortium": "lungs", "epoch": 4, "floor": 2, "coordinator": "a:1", "next_id": 4, "sites": SITES}
    return Membership.model_validate(fields | changes)


def test_a_signed_roster_is_read_back_with_the_pinned_key_and_no_other() -> None:
    signed = Signed.parse(membership().signed(KEY).to_bytes())
    assert Membership.verified(signed, KEY.public_key()) == membership()
    with pytest.raises(SignatureRefused):
        Membership.verified(signed, Ed25519PrivateKey.generate().public_key())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"floor": 5}, "floor lies above epoch"),
        ({"next_id": 3}, "above next_id"),
        ({"sites": (SITES[0], site(2, "north"))}, "same name"),
        ({"sites": (SITES[0], site(2, "south", id=1))}, "same id"),
        ({"sites": (SITES[0], site(2, "south", site_key=SITES[0].site_key))}, "same key"),
        ({"sites": (SITES[0], site(2, "south", node_key=NODE_KEYS[0]))}, "same node key"),
        ({"minimum_cohort": 2}, "minimum_cohort"),
        ({"coordinator": "https://a:1"}, "coordinator"),
        ({"sitess": ()}, "sitess"),
    ],
)
def test_a_roster_that_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        membership(**changes)


@pytest.mark.parametrize("key", ["nonsense", NODE_KEYS[0]])
def test_a_site_key_is_an_ed25519_key(key: str) -> None:
    with pytest.raises(ValidationError, match="site_key"):
        site(1, "north", site_key=key)


def test_what_was_signed_and_is_no_roster_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="signed roster cannot be used"):
        Membership.verified(sign(KEY, Document.ROSTER, b'{"epoch": 1}'), KEY.public_key())


def test_the_rosters_fingerprint_changes_with_every_key_and_the_sites_is_that_of_its_key_file() -> None:
    other = site(3, "west", site_key=public_line(Ed25519PrivateKey.from_private_bytes(b"x" * 32).public_key()))
    rosters = (membership(), membership(sites=(*SITES[:2], other)), membership(sites=SITES[:2]), membership(epoch=5))
    assert len({roster.fingerprint for roster in rosters}) == 4
    assert SITES[0].fingerprint == fingerprint(Ed25519PrivateKey.from_private_bytes(b"\1" * 32).public_key())


def test_the_part_that_sums_are_bound_to_has_every_site_under_its_id() -> None:
    roster = membership().roster
    assert [(member.id, member.name) for member in roster.members] == [(1, "north"), (2, "south"), (3, "west")]
    assert (roster.epoch, roster.minimum_cohort) == (4, 3)
