from __future__ import annotations

import datetime
from typing import Any

import pytest
from pydantic import ValidationError
from tiny import classes_study, masks_study

from medfl.client.approvals import Approvals
from medfl.client.policy import Policy
from medfl.shared.errors import PolicyRefusal
from medfl.shared.study import Study

TODAY = datetime.date(2027, 5, 1)
PLAIN = classes_study()
PRIVATE = masks_study(privacy={"mode": "dp-sgd", "epsilon": 4.0, "delta": 1e-6}, secure_aggregation={"mode": "msa1"})
BY_IMAGE = masks_study(
    privacy={"mode": "dp-sgd", "epsilon": 4.0, "delta": 1e-6, "unit": "image", "images_per_patient": 3},
    secure_aggregation={"mode": "msa1"},
)


def plain_policy(**changes: Any) -> Policy:
    base = {"studies": (PLAIN.digest,), "allow_no_privacy": True, "require_secure_aggregation": False}
    return Policy(**{**base, **changes})


def private_policy(study: Study = PRIVATE, **changes: Any) -> Policy:
    return Policy(**{"studies": (study.digest,), "max_epsilon_per_study": 4.0, "max_delta": 1e-6, **changes})


def refusal(policy: Policy, study: Study, today: datetime.date = TODAY) -> tuple[str, str]:
    with pytest.raises(PolicyRefusal) as caught:
        Approvals(policy).permit(study, today=today)
    return caught.value.reason, str(caught.value)


def test_an_absent_policy_denies_everything() -> None:
    for study in (PLAIN, PRIVATE, BY_IMAGE):
        assert refusal(Policy(), study)[0] == "study not approved"


def test_what_the_policy_permits_may_run() -> None:
    Approvals(plain_policy()).permit(PLAIN, today=TODAY)
    Approvals(private_policy()).permit(PRIVATE, today=TODAY)
    Approvals(private_policy(BY_IMAGE, unit="image")).permit(BY_IMAGE, today=TODAY)


def test_a_study_that_is_not_approved_is_refused_with_the_digest_to_add() -> None:
    reason, text = refusal(plain_policy(studies=("0" * 64,)), PLAIN)
    assert reason == "study not approved"
    assert PLAIN.digest in text


def test_any_change_of_an_approved_study_takes_its_approval_away() -> None:
    assert refusal(plain_policy(), classes_study(seed=1))[0] == "study not approved"


def test_no_privacy_must_be_allowed_in_so_many_words() -> None:
    reason, text = refusal(plain_policy(allow_no_privacy=False), PLAIN)
    assert reason == "privacy required"
    assert "policy.allow_no_privacy" in text
    with pytest.raises(ValidationError):
        Policy(allow_no_privacy="yes")  # type: ignore[arg-type]


def test_a_study_in_clear_is_refused_unless_the_policy_says_otherwise() -> None:
    reason, text = refusal(plain_policy(require_secure_aggregation=True), PLAIN)
    assert reason == "secure aggregation required"
    assert "policy.require_secure_aggregation" in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_epsilon_per_study": 3.99}, "epsilon above ceiling"),
        ({"max_epsilon_per_study": 0.0}, "epsilon above ceiling"),
        ({"max_delta": 9e-7}, "delta above ceiling"),
    ],
)
def test_no_message_can_raise_a_ceiling(changes: dict[str, float], reason: str) -> None:
    assert refusal(private_policy(**changes), PRIVATE)[0] == reason


def test_images_as_the_unit_are_too_weak_for_a_site_that_asks_for_patients() -> None:
    assert refusal(private_policy(BY_IMAGE), BY_IMAGE)[0] == "unit too weak"


def test_a_policy_holds_through_its_last_day() -> None:
    policy = plain_policy(expires=TODAY)
    Approvals(policy).permit(PLAIN, today=TODAY)
    reason, text = refusal(policy, PLAIN, TODAY + datetime.timedelta(days=1))
    assert reason == "expired"
    assert "renew policy.expires" in text


def test_an_upload_may_be_as_large_as_the_ceiling_and_no_larger() -> None:
    policy = Policy(max_upload_mb_per_round=1.5)
    policy.permit_upload(1_500_000)
    with pytest.raises(PolicyRefusal, match=r"1\.5") as caught:
        policy.permit_upload(1_500_001)
    assert caught.value.reason == "upload too large"


@pytest.mark.parametrize(
    "wrong", [{"studies": ["ABC"]}, {"studies": ["0" * 63]}, {"minimum_cohort": 2}, {"max_epsilon_per_study": -1}]
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Policy(**wrong)


def utc(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text + "+00:00")


def test_hours_are_those_of_the_sites_own_clock_summer_and_winter() -> None:
    # Berlin is two hours ahead of UTC in May, one in December; 3 May 2027 is a Monday, as is 6 December
    policy = Policy(hours=("mon-fri 20:00-23:00",), time_zone="Europe/Berlin")
    policy.permit_hour(utc("2027-05-03T18:00"))
    policy.permit_hour(utc("2027-12-06T19:00"))
    for closed in ("2027-05-03T17:59", "2027-05-03T21:00", "2027-12-06T18:59", "2027-05-02T18:30"):
        with pytest.raises(PolicyRefusal) as caught:
            policy.permit_hour(utc(closed))
        assert caught.value.reason == "outside hours"
    assert "policy.hours (mon-fri 20:00-23:00)" in str(caught.value)


def test_any_of_several_windows_will_do_and_without_windows_every_hour_does() -> None:
    policy = Policy(hours=("mon 20:00-23:00", "tue"), time_zone="UTC")
    policy.permit_hour(utc("2027-05-04T09:00"))
    Policy().permit_hour(utc("2027-05-04T09:00"))


def test_a_day_ends_at_the_sites_midnight() -> None:
    assert Policy(time_zone="Asia/Tokyo").local(utc("2027-05-03T20:00")).date() == datetime.date(2027, 5, 4)


@pytest.mark.parametrize("wrong", [{"hours": ["at night"]}, {"time_zone": "Berlin"}, {"time_zone": "../etc/passwd"}])
def test_hours_that_cannot_be_read_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Policy(**wrong)
