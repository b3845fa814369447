"""Who may run here: decisions outlive the process, count at once, and nothing but the very study is approved."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from signer import KEY, offer_of
from tiny import classes_study, masks_study

from medfl.client import approvals as approvals_module
from medfl.client.approvals import Approvals, Decision, Standing, signed_offer
from medfl.client.policy import Policy, PreApproval
from medfl.shared.errors import DataError, PolicyRefusal
from medfl.shared.keys import fingerprint
from medfl.shared.signing import Signed
from medfl.shared.study import Study

STUDY = classes_study()
TODAY = datetime.date(2027, 5, 1)
NOW = datetime.datetime(2027, 5, 1, 12, tzinfo=datetime.UTC)
YES = Decision(approved=True, by="Dr A. Example", ethics="2027-12", at=NOW)
NO = Decision(approved=False, by="Dr A. Example", at=NOW)
OPEN = Policy(allow_no_privacy=True, require_secure_aggregation=False)


def signed(study: Study) -> Signed:
    offer = offer_of(study)
    return signed_offer(offer.canonical, offer.signature)


def reason(approvals: Approvals, study: Study = STUDY) -> str:
    try:
        approvals.permit(study, today=TODAY)
    except PolicyRefusal as refusal:
        return refusal.reason
    return ""


def test_an_offered_study_waits_until_a_person_approves_it(tmp_path: Path) -> None:
    approvals = Approvals(OPEN, tmp_path)
    approvals.offer(STUDY, signed(STUDY))
    assert approvals.standing(STUDY.digest) is Standing.PENDING
    assert reason(approvals) == "study not approved"
    approvals.decide(STUDY.digest, YES)
    assert approvals.standing(STUDY.digest) is Standing.APPROVED
    assert reason(approvals) == ""
    assert approvals.approved() == [STUDY.digest]


def test_whatever_changes_a_standing_shows() -> None:
    approvals = Approvals(OPEN)
    seen = [approvals.changes]
    approvals.offer(STUDY, signed(STUDY))
    seen.append(approvals.changes)
    for decision in (YES, NO):
        approvals.decide(STUDY.digest, decision)
        seen.append(approvals.changes)
    assert len(set(seen)) == 4
    assert reason(approvals) == "study withdrawn"
    assert approvals.changes == seen[-1]


def test_a_decision_and_the_offer_outlive_the_process(tmp_path: Path) -> None:
    first = Approvals(OPEN, tmp_path)
    first.offer(STUDY, signed(STUDY))
    first.decide(STUDY.digest, YES)
    again = Approvals(OPEN, tmp_path)
    assert again.decision(STUDY.digest) == YES
    assert [one.study for one in again.offered()] == [STUDY]
    again.decide(STUDY.digest, NO)
    assert Approvals(OPEN, tmp_path).standing(STUDY.digest) is Standing.WITHDRAWN


def test_the_files_are_for_the_owner_only(tmp_path: Path) -> None:
    approvals = Approvals(OPEN, tmp_path)
    approvals.offer(STUDY, signed(STUDY))
    approvals.decide(STUDY.digest, YES)
    files = [path for path in (tmp_path / "studies").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["decision.json", "offer.signed"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)


def test_a_withdrawal_counts_more_than_the_policys_list(tmp_path: Path) -> None:
    policy = OPEN.model_copy(update={"studies": (STUDY.digest,)})
    approvals = Approvals(policy, tmp_path)
    assert approvals.standing(STUDY.digest) is Standing.LISTED
    approvals.decide(STUDY.digest, NO)
    assert reason(approvals) == "study withdrawn"
    approvals.decide(STUDY.digest, YES)
    assert reason(approvals) == ""


def test_any_change_of_an_approved_study_needs_an_approval_of_its_own(tmp_path: Path) -> None:
    approvals = Approvals(OPEN, tmp_path)
    approvals.decide(STUDY.digest, YES)
    for changed in (classes_study(seed=1), classes_study(purpose="another"), classes_study(ethics="2027-13")):
        assert reason(approvals, changed) == "study not approved"


def test_an_approval_raises_no_ceiling_of_the_policy(tmp_path: Path) -> None:
    approvals = Approvals(Policy(), tmp_path)
    approvals.decide(STUDY.digest, YES)
    assert reason(approvals) == "secure aggregation required"


def test_a_study_ends_with_its_last_day(tmp_path: Path) -> None:
    ends = classes_study(last_day=str(TODAY))
    approvals = Approvals(OPEN, tmp_path)
    approvals.decide(ends.digest, YES)
    assert reason(approvals, ends) == ""
    with pytest.raises(PolicyRefusal) as caught:
        approvals.permit(ends, today=TODAY + datetime.timedelta(days=1))
    assert caught.value.reason == "study over"


def test_a_damaged_decision_stops_everything_because_it_may_have_been_a_withdrawal(tmp_path: Path) -> None:
    approvals = Approvals(OPEN, tmp_path)
    approvals.decide(STUDY.digest, NO)
    path = tmp_path / "studies" / STUDY.digest / "decision.json"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"decision\.json cannot be read"):
        Approvals(OPEN, tmp_path)


def test_a_damaged_offer_is_as_if_it_had_not_come(tmp_path: Path) -> None:
    approvals = Approvals(OPEN, tmp_path)
    approvals.offer(STUDY, signed(STUDY))
    path = tmp_path / "studies" / STUDY.digest / "offer.signed"
    path.write_bytes(b"{}")
    again = Approvals(OPEN, tmp_path)
    assert again.offered() == []
    again.offer(STUDY, signed(STUDY))
    assert [one.study for one in Approvals(OPEN, tmp_path).offered()] == [STUDY]


def test_no_coordinator_fills_the_disk_with_offers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approvals_module, "MOST_UNDECIDED", 2)
    approvals = Approvals(OPEN, tmp_path)
    studies = [classes_study(seed=seed) for seed in range(3)]
    for study in studies[:2]:
        approvals.offer(study, signed(study))
    with pytest.raises(PolicyRefusal) as caught:
        approvals.offer(studies[2], signed(studies[2]))
    assert caught.value.reason == "too many studies"
    approvals.offer(studies[0], signed(studies[0]))  # known: nothing new
    approvals.decide(studies[0].digest, NO)
    approvals.offer(studies[2], signed(studies[2]))


SIGNER = fingerprint(KEY.public_key())
PRIVATE = masks_study(
    privacy={"mode": "dp-sgd", "epsilon": 4.0, "delta": 1e-6},
    secure_aggregation={"mode": "msa1"},
    rounds={"count": 10, "minimum_sites": 4},
)


def pre_approval(**changes: Any) -> PreApproval:
    base = {"tasks": ["segmentation"], "max_epsilon": 4, "minimum_sites": 4, "max_rounds": 10, "signer": SIGNER}
    return PreApproval.model_validate({**base, **changes})


def standing(rule: PreApproval, study: Study = PRIVATE, signer: str = SIGNER) -> Standing:
    approvals = Approvals(Policy(pre_approve=(rule,)), signer=signer)
    approvals.offer(study, signed(study))
    return approvals.standing(study.digest)


def test_a_class_of_studies_may_be_approved_beforehand() -> None:
    assert standing(pre_approval()) is Standing.PRE_APPROVED


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": ["classification"]},
        {"max_epsilon": 3.9},
        {"minimum_sites": 5},
        {"max_rounds": 9},
        {"signer": "SHA256:" + "A" * 43},
    ],
)
def test_every_ceiling_of_a_pre_approval_counts(changes: dict[str, Any]) -> None:
    assert standing(pre_approval(**changes)) is Standing.PENDING


def test_a_pre_approval_with_a_ceiling_never_covers_a_study_without_privacy_or_in_clear() -> None:
    plain = PRIVATE.model_copy(update={"privacy": classes_study().privacy})
    assert standing(pre_approval(), plain) is Standing.PENDING
    assert standing(pre_approval(max_epsilon=None), plain) is Standing.PRE_APPROVED
    clear = PRIVATE.model_copy(update={"secure_aggregation": classes_study().secure_aggregation})
    assert standing(pre_approval(), clear) is Standing.PENDING
    assert standing(pre_approval(secure_aggregation=False), clear) is Standing.PRE_APPROVED


def test_without_a_pinned_key_nothing_is_approved_beforehand() -> None:
    assert standing(pre_approval(), signer="") is Standing.PENDING


def test_a_pre_approved_study_can_be_withdrawn() -> None:
    approvals = Approvals(Policy(pre_approve=(pre_approval(),)), signer=SIGNER)
    approvals.offer(PRIVATE, signed(PRIVATE))
    approvals.decide(PRIVATE.digest, NO)
    assert approvals.standing(PRIVATE.digest) is Standing.WITHDRAWN
