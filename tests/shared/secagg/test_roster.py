"""The roster that secure sums are bound to: checked, and hashed over everything it says."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfl.shared.errors import ConfigError, ProtocolError
from medfl.shared.keys import fingerprint
from medfl.shared.secagg.roster import Member, make_roster

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in range(1, 7)]
MEMBERS = tuple(Member(i, f"hospital-{i}", key.public_key().public_bytes_raw()) for i, key in enumerate(KEYS, start=1))
ROSTER = make_roster("lungs: it's ours", 3, MEMBERS)


def test_a_minimum_that_is_not_given_follows_from_the_size() -> None:
    assert make_roster("c", 1, MEMBERS).minimum_cohort == 4  # max(4, half of 6)
    assert make_roster("c", 1, MEMBERS[:4]).minimum_cohort == 3


@pytest.mark.parametrize(("sites", "minimum"), [(255, 128), (256, 128), (257, 128), (1000, 128)])
def test_a_minimum_that_follows_from_the_size_is_never_more_than_can_be_summed(sites: int, minimum: int) -> None:
    members = [Member(i, f"hospital-{i}", i.to_bytes(32, "big")) for i in range(1, sites + 1)]
    assert make_roster("c", 1, members).minimum_cohort == minimum


def test_the_order_of_members_does_not_matter_and_everything_else_does() -> None:
    assert make_roster(ROSTER.consortium, 3, reversed(MEMBERS)).digest == ROSTER.digest
    others = [
        make_roster("livers", 3, MEMBERS),
        make_roster(ROSTER.consortium, 4, MEMBERS),
        make_roster(ROSTER.consortium, 3, MEMBERS, minimum_cohort=5),
        make_roster(ROSTER.consortium, 3, MEMBERS[:5], minimum_cohort=4),
        make_roster(ROSTER.consortium, 3, (*MEMBERS[:5], replace(MEMBERS[5], id=9))),
        make_roster(ROSTER.consortium, 3, (*MEMBERS[:5], replace(MEMBERS[5], name="other"))),
        make_roster(ROSTER.consortium, 3, (*MEMBERS[:5], replace(MEMBERS[5], key=bytes(32)))),
    ]
    assert len({roster.digest for roster in (ROSTER, *others)}) == 8


@pytest.mark.parametrize("what", ["id", "name", "key"])
def test_two_sites_with_one_id_name_or_key_are_refused(what: str) -> None:
    twin = replace(MEMBERS[5], **{what: getattr(MEMBERS[0], what)})
    with pytest.raises(ConfigError, match=f"two sites have the same {what}"):
        make_roster("c", 1, (*MEMBERS[:5], twin))


def test_the_signature_of_rfc_8032_counts() -> None:
    # Section 7.1, test 2
    key = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
    signature = bytes.fromhex(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    roster = make_roster("lungs", 1, [Member(1, "north", key)])
    roster.check_signature(1, signature, b"\x72")
    with pytest.raises(ProtocolError):
        roster.check_signature(1, signature, b"\x73")


def test_a_signature_counts_only_with_the_members_own_key() -> None:
    ROSTER.check_signature(2, KEYS[1].sign(b"message"), b"message")
    for site, key, message in ((2, KEYS[2], b"message"), (2, KEYS[1], b"another"), (9, KEYS[1], b"message")):
        with pytest.raises(ProtocolError):
            ROSTER.check_signature(site, key.sign(b"message"), message)


def test_fingerprints_are_those_of_the_key_files() -> None:
    assert MEMBERS[0].fingerprint == fingerprint(KEYS[0].public_key())
    assert (ROSTER.name(1), ROSTER.name(99)) == ("hospital-1", "site 99")


@pytest.mark.parametrize(
    "member", [Member(0, "a", bytes(32)), Member(65535, "a", bytes(32)), Member(1, "a", bytes(31))]
)
def test_impossible_members_are_refused(member: Member) -> None:
    with pytest.raises(ConfigError, match="between 1 and 65534"):
        make_roster("c", 1, [member])


@pytest.mark.parametrize("minimum", [2, 129])
def test_impossible_minima_are_refused(minimum: int) -> None:
    with pytest.raises(ConfigError, match="minimum_cohort"):
        make_roster("c", 1, MEMBERS, minimum_cohort=minimum)
