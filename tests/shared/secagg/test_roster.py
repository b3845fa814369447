"""The roster: read from a file with told mistakes, hashed over everything it says."""

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfl.shared.errors import ConfigError, ProtocolError
from medfl.shared.keys import fingerprint, public_line
from medfl.shared.secagg.roster import Member, load_roster, make_roster, roster_text

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in range(1, 7)]
MEMBERS = tuple(Member(i, f"hospital-{i}", key.public_key().public_bytes_raw()) for i, key in enumerate(KEYS, start=1))
ROSTER = make_roster("lungs: it's ours", 3, MEMBERS)


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "roster.yaml").write_text(text)
    return tmp_path / "roster.yaml"


def test_a_roster_file_gives_the_roster_back(tmp_path: Path) -> None:
    assert load_roster(written(tmp_path, roster_text(ROSTER))) == ROSTER


def test_a_minimum_that_is_not_given_follows_from_the_size(tmp_path: Path) -> None:
    text = roster_text(ROSTER).replace("minimum_cohort: 4\n", "")
    assert "minimum" not in text
    assert load_roster(written(tmp_path, text)).minimum_cohort == 4  # max(4, half of 6)
    assert make_roster("c", 1, MEMBERS[:4]).minimum_cohort == 3


def test_the_order_in_the_file_does_not_matter_and_everything_else_does() -> None:
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
def test_two_sites_with_one_id_name_or_key_are_refused(tmp_path: Path, what: str) -> None:
    twin = replace(MEMBERS[5], **{what: getattr(MEMBERS[0], what)})
    with pytest.raises(ConfigError, match=f"two sites have the same {what}"):
        load_roster(written(tmp_path, roster_text(replace(ROSTER, members=(*MEMBERS[:5], twin)))))


def test_mistakes_are_told_with_their_place(tmp_path: Path) -> None:
    node_key = public_line(ec.generate_private_key(ec.SECP384R1()).public_key())
    site_key = public_line(KEYS[0].public_key())
    for old, new, problem in (
        (site_key, node_key, r"roster.yaml:7:5: sites.0.key: is not an Ed25519 key"),
        (site_key, "nonsense", r"roster.yaml:7:5: sites.0.key: a public key is malformed"),
        ("id: 1\n", "id: 65535\n", r"roster.yaml:5:5: sites.0.id: "),
        ("epoch: 3", "epoch: 0", r"roster.yaml:2:1: epoch: "),
        ("minimum_cohort: 4", "minimum_cohort: 2", r"roster.yaml:3:1: minimum_cohort: "),
    ):
        text = roster_text(ROSTER)
        assert old in text
        with pytest.raises(ConfigError, match=problem):
            load_roster(written(tmp_path, text.replace(old, new)))


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
