"""A roster is believed only as far as this site's administrator has confirmed it."""

from dataclasses import replace
from pathlib import Path

import pytest

from medfl.client.secagg.confirmed_roster import ConfirmedRoster
from medfl.shared.errors import DataError, PolicyRefusal
from medfl.shared.secagg.reasons import Reason
from medfl.shared.secagg.roster import Member, make_roster

MEMBERS = tuple(Member(site, f"hospital-{site}", bytes([site]) * 32) for site in (1, 2, 3, 4))


def refused(confirmed: ConfirmedRoster, roster: object) -> PolicyRefusal:
    with pytest.raises(PolicyRefusal) as refusal:
        confirmed.check(roster)
    return refusal.value


def test_nothing_is_confirmed_at_first(tmp_path: Path) -> None:
    refusal = refused(ConfirmedRoster(tmp_path), make_roster("lungs", 1, MEMBERS))
    assert refusal.reason == Reason.UNCONFIRMED_ROSTER


def test_a_confirmed_roster_is_believed_also_after_a_restart(tmp_path: Path) -> None:
    roster = make_roster("lungs", 1, MEMBERS)
    ConfirmedRoster(tmp_path).confirm(roster)
    ConfirmedRoster(tmp_path).check(roster)


def test_a_new_key_waits_for_the_administrator_and_is_named_with_its_fingerprint(tmp_path: Path) -> None:
    confirmed = ConfirmedRoster(tmp_path)
    confirmed.confirm(make_roster("lungs", 1, MEMBERS))
    phantom = Member(5, "hospital-5", b"p" * 32)
    grown = make_roster("lungs", 2, (*MEMBERS, phantom))
    assert phantom.fingerprint in str(refused(confirmed, grown))
    assert confirmed.unconfirmed(grown) == (phantom,)
    confirmed.confirm(grown)
    confirmed.check(grown)


@pytest.mark.parametrize("change", [{"key": b"x" * 32}, {"name": "hospital-9"}, {"id": 9}])
def test_a_replaced_key_name_or_id_waits_for_the_administrator(tmp_path: Path, change: dict[str, object]) -> None:
    confirmed = ConfirmedRoster(tmp_path)
    confirmed.confirm(make_roster("lungs", 1, MEMBERS))
    changed = make_roster("lungs", 2, (*MEMBERS[:3], replace(MEMBERS[3], **change)))
    assert refused(confirmed, changed).reason == Reason.UNCONFIRMED_ROSTER


def test_a_site_that_leaves_needs_no_confirmation(tmp_path: Path) -> None:
    confirmed = ConfirmedRoster(tmp_path)
    confirmed.confirm(make_roster("lungs", 1, MEMBERS))
    confirmed.check(make_roster("lungs", 2, MEMBERS[:3]))


def test_a_lowered_smallest_cohort_waits_for_the_administrator(tmp_path: Path) -> None:
    nine = tuple(Member(site, f"hospital-{site}", bytes([site]) * 32) for site in range(1, 10))
    confirmed = ConfirmedRoster(tmp_path)
    confirmed.confirm(make_roster("lungs", 1, nine))  # half of nine, rounded up: 5
    assert refused(confirmed, make_roster("lungs", 2, nine, minimum_cohort=4)).reason == Reason.UNCONFIRMED_ROSTER
    confirmed.check(make_roster("lungs", 2, nine[:8]))  # one site left: 4 is usual for eight
    assert refused(confirmed, make_roster("lungs", 2, nine[:8], minimum_cohort=3)).reason == Reason.UNCONFIRMED_ROSTER
    confirmed.confirm(make_roster("lungs", 2, nine, minimum_cohort=3))
    confirmed.check(make_roster("lungs", 3, nine, minimum_cohort=3))


def test_a_smallest_cohort_above_the_usual_one_stays_while_there_are_so_many_sites(tmp_path: Path) -> None:
    twelve = tuple(Member(site, f"hospital-{site}", bytes([site]) * 32) for site in range(1, 13))
    confirmed = ConfirmedRoster(tmp_path)
    confirmed.confirm(make_roster("lungs", 1, twelve, minimum_cohort=10))  # half of twelve, which is usual: 6
    for sites, least in ((12, 10), (11, 10), (10, 10), (9, 9), (4, 4), (3, 3)):
        confirmed.check(make_roster("lungs", 2, twelve[:sites], minimum_cohort=least))
        if least > 3:
            lowered = make_roster("lungs", 2, twelve[:sites], minimum_cohort=least - 1)
            assert refused(confirmed, lowered).reason == Reason.UNCONFIRMED_ROSTER
    confirmed.confirm(make_roster("lungs", 2, twelve, minimum_cohort=6))
    confirmed.check(make_roster("lungs", 3, twelve, minimum_cohort=6))


def test_an_older_epoch_or_another_consortium_is_refused(tmp_path: Path) -> None:
    confirmed = ConfirmedRoster(tmp_path)
    confirmed.confirm(make_roster("lungs", 3, MEMBERS))
    older = make_roster("lungs", 2, MEMBERS)
    assert refused(confirmed, older).reason == Reason.BAD_ROSTER
    with pytest.raises(PolicyRefusal):
        confirmed.confirm(older)
    assert refused(confirmed, make_roster("livers", 3, MEMBERS)).reason == Reason.UNCONFIRMED_ROSTER


def test_a_damaged_file_is_an_error_and_confirms_nothing(tmp_path: Path) -> None:
    confirmed = ConfirmedRoster(tmp_path)
    (tmp_path / "roster.json").write_text('{"consortium": "lungs"}')
    with pytest.raises(DataError, match="confirm the roster again"):
        confirmed.check(make_roster("lungs", 1, MEMBERS))
