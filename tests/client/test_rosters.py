"""What a site believes of rosters: the pinned signature, epochs that never go back, keys that somebody confirmed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfl.client.pin import Pin
from medfl.client.rosters import SiteRosters
from medfl.shared.consortium import Membership, Site
from medfl.shared.errors import DataError, PolicyRefusal, ProtocolError
from medfl.shared.keys import public_line
from medfl.shared.signing import SignatureRefused

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
NAMES = ("north", "south", "west", "east", "centre")


def site(number: int, *, key: int | None = None) -> Site:
    secret = Ed25519PrivateKey.from_private_bytes(bytes([key or number]) * 32)
    node_key = public_line(ec.derive_private_key(key or number, ec.SECP384R1()).public_key())
    name, line = NAMES[number - 1], public_line(secret.public_key())
    return Site(id=number, name=name, site_key=line, node_key=node_key)


def membership(epoch: int, *numbers: int, floor: int = 1, **changes: Any) -> Membership:
    fields = {
        "consortium": "lungs",
        "epoch": epoch,
        "floor": floor,
        "coordinator": "a:1",
        "next_id": 10,
        "sites": tuple(site(number) for number in numbers),
    }
    return Membership.model_validate(fields | changes)


@pytest.fixture
def rosters(tmp_path: Path) -> SiteRosters:
    """North's, which has confirmed north, south and west in epoch 2."""
    return confirmed(opened(tmp_path))


def opened(folder: Path) -> SiteRosters:
    return SiteRosters(folder / "roster", Pin("lungs", KEY.public_key()), site="north", key=site(1).site_key)


def confirmed(rosters: SiteRosters) -> SiteRosters:
    first = membership(2, 1, 2, 3)
    rosters.receive(first.signed(KEY))
    rosters.confirm(first)
    return rosters


def in_force(rosters: SiteRosters) -> int:
    force = rosters.in_force()
    return 0 if force is None else force.epoch


def test_nothing_is_in_force_before_somebody_has_confirmed(tmp_path: Path) -> None:
    rosters = opened(tmp_path)
    assert rosters.newest() is None
    rosters.receive(membership(2, 1, 2, 3).signed(KEY))
    assert in_force(rosters) == 0
    assert [site.name for site in rosters.unconfirmed()] == ["north", "south", "west"]


def test_a_forged_roster_is_refused_and_not_kept(rosters: SiteRosters) -> None:
    forger = Ed25519PrivateKey.generate()
    with pytest.raises(SignatureRefused):
        rosters.receive(membership(3, 1, 2, 3, 4).signed(forger))
    assert in_force(opened(rosters.folder.parent)) == 2


def test_a_rolled_back_roster_is_refused_also_after_a_restart(rosters: SiteRosters, tmp_path: Path) -> None:
    rosters.receive(membership(5, 1, 2, floor=5).signed(KEY))
    for known in (rosters, opened(tmp_path)):
        with pytest.raises(PolicyRefusal, match="went back from roster epoch 5 to 2"):
            known.receive(membership(2, 1, 2, 3).signed(KEY))


def test_two_rosters_of_one_epoch_are_one_too_many(rosters: SiteRosters) -> None:
    assert rosters.receive(membership(2, 1, 2, 3).signed(KEY)) is None
    with pytest.raises(PolicyRefusal, match="another roster of epoch 2"):
        rosters.receive(membership(2, 1, 2, 4).signed(KEY))


def test_what_was_taken_away_is_not_given_back_by_a_lower_floor(rosters: SiteRosters) -> None:
    rosters.receive(membership(3, 1, 2, floor=3).signed(KEY))
    with pytest.raises(PolicyRefusal, match="undoes what epoch 3 took away"):
        rosters.receive(membership(4, 1, 2, floor=1).signed(KEY))


def test_another_consortiums_roster_is_refused_even_with_the_same_key(rosters: SiteRosters) -> None:
    with pytest.raises(PolicyRefusal, match="is of hearts, and lungs is pinned here"):
        rosters.receive(membership(3, 1, 2, 3, consortium="hearts").signed(KEY))


def test_a_new_site_waits_and_the_roster_before_stays_in_force(rosters: SiteRosters) -> None:
    grown = membership(3, 1, 2, 3, 4)
    rosters.receive(grown.signed(KEY))
    assert in_force(rosters) == 2
    assert [site.name for site in rosters.unconfirmed()] == ["east"]
    with pytest.raises(PolicyRefusal, match="keys that nobody here has confirmed: east"):
        rosters.with_digest(grown.roster.digest)
    rosters.confirm(grown)
    assert in_force(rosters) == 3


def test_a_site_that_leaves_is_left_out_at_once(rosters: SiteRosters) -> None:
    old, shrunk = membership(2, 1, 2, 3), membership(3, 1, 2, floor=3)
    rosters.receive(shrunk.signed(KEY))
    assert in_force(rosters) == 3
    with pytest.raises(PolicyRefusal):
        rosters.with_digest(old.roster.digest)
    assert rosters.with_digest(old.roster.digest, finishing=True) == old.roster


def test_a_replaced_key_waits_and_the_old_one_counts_no_longer(rosters: SiteRosters) -> None:
    """A site lost its key: nobody sums with the old one, and with the new one not before the telephone call."""
    old = membership(2, 1, 2, 3)
    replaced = membership(3, floor=3, sites=(site(1), site(2, key=9), site(3)))
    rosters.receive(replaced.signed(KEY))
    assert in_force(rosters) == 0
    for digest in (old.roster.digest, replaced.roster.digest):
        with pytest.raises(PolicyRefusal):
            rosters.with_digest(digest)
    rosters.confirm(replaced)
    assert in_force(rosters) == 3


def test_a_site_that_was_removed_or_given_another_key_sums_nothing_more(rosters: SiteRosters) -> None:
    assert not rosters.removed()
    rosters.receive(membership(3, floor=3, sites=(site(1, key=9), site(2), site(3))).signed(KEY))
    assert rosters.removed()
    assert in_force(rosters) == 0


def test_an_unknown_digest_is_another_roster(rosters: SiteRosters) -> None:
    with pytest.raises(ProtocolError, match="another roster than epoch 2"):
        rosters.with_digest(bytes(32))


def test_a_damaged_file_is_told_with_the_way_out(rosters: SiteRosters, tmp_path: Path) -> None:
    (rosters.folder / "2.json").write_text("{}")
    with pytest.raises(DataError, match="remove that file"):
        opened(tmp_path).newest()
