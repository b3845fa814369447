"""Charges add up over a site's life, are refused beyond the ceilings, and nothing leaves uncharged."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from medfl.client.privacy.ledger import Ceilings, Charge, Ledger
from medfl.shared.chain import GENESIS, Head
from medfl.shared.errors import ConfigError, PolicyRefusal
from medfl.shared.privacy.accounting import SampledGaussian, epsilon
from medfl.shared.privacy.plan import TrainingPlan
from medfl.shared.privacy.settings import Unit

# A plain Gaussian release of noise multiplier 5, four times a round: epsilon 1.58 after one round, 2.30 after two.
PLAN = TrainingPlan(
    unit=Unit.PATIENT,
    epsilon=4.0,
    delta=1e-5,
    clip_norm=1.0,
    noise_multiplier=5.0,
    sampling_rate=1.0,
    expected_batch=8.0,
    steps_per_round=4,
)
CEILINGS = Ceilings(epsilon_per_study=3.0, epsilon_total=4.0)
LUNGS, HEART = "a" * 64, "b" * 64


def open_ledger(path: Path, ceilings: Ceilings = CEILINGS, cohort: str = "all patients") -> Ledger:
    return Ledger(path, cohort=cohort, ceilings=ceilings)


def charge(round_number: int, study: str = LUNGS, attempt: str = "") -> Charge:
    return Charge(study, round_number, attempt or f"{study[0]}{round_number}", PLAN.round_cost)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with open_ledger(path) as opened:
        opened.fix_plan(LUNGS, PLAN, patients=200)
        opened.fix_plan(HEART, PLAN, patients=200)
        yield opened


def test_an_empty_ledger_has_spent_nothing(ledger: Ledger) -> None:
    assert (ledger.spent(LUNGS).study, ledger.spent(LUNGS).total) == (0.0, 0.0)


def test_rounds_compose(ledger: Ledger) -> None:
    ledger.charge(charge(1))
    ledger.charge(charge(2))
    assert ledger.spent(LUNGS).study == pytest.approx(epsilon([SampledGaussian(5.0, 1.0, 8)], 1e-5))
    # Two rounds cost sqrt(2) times one or less: they are not added up naively.
    assert ledger.spent(LUNGS).study < 2 * epsilon([PLAN.round_cost], 1e-5)


def test_studies_on_the_same_patients_add_up(ledger: Ledger) -> None:
    ledger.charge(charge(1))
    ledger.charge(charge(1, HEART))
    assert ledger.spent(HEART).study == pytest.approx(epsilon([PLAN.round_cost], 1e-5))
    assert ledger.spent(HEART).total == pytest.approx(epsilon([SampledGaussian(5.0, 1.0, 8)], 1e-5))


def test_spending_survives_a_restart(path: Path, ledger: Ledger) -> None:
    ledger.charge(charge(1))
    before = ledger.spent(LUNGS)
    ledger.close()
    with open_ledger(path) as again:
        assert again.spent(LUNGS) == before
        assert again.plan(LUNGS) == PLAN


def test_the_round_that_would_pass_the_studys_ceiling_is_refused_with_the_numbers(ledger: Ledger) -> None:
    # 12 steps cost 2.87, 16 cost 3.38: above epsilon_per_study 3.
    for number in (1, 2, 3):
        ledger.charge(charge(number))
    spent = ledger.spent(LUNGS)
    with pytest.raises(PolicyRefusal, match=r"round 4 .* epsilon 3\.\d+ .*max_epsilon_per_study 3") as refusal:
        ledger.charge(charge(4))
    assert refusal.value.reason == "budget"
    assert ledger.spent(LUNGS) == spent


def test_the_total_ceiling_counts_every_study(path: Path) -> None:
    with open_ledger(path, Ceilings(epsilon_per_study=3.0, epsilon_total=3.0)) as ledger:
        ledger.fix_plan(LUNGS, PLAN, patients=200)
        ledger.fix_plan(HEART, PLAN, patients=200)
        for number in (1, 2, 3):
            ledger.charge(charge(number))
        with pytest.raises(PolicyRefusal, match=r"max_epsilon_total 3"):
            ledger.charge(charge(1, HEART))


def test_a_studys_own_promise_is_a_ceiling_too(path: Path) -> None:
    with open_ledger(path, Ceilings(epsilon_per_study=100.0, epsilon_total=100.0)) as ledger:
        ledger.fix_plan(LUNGS, replace(PLAN, epsilon=2.0), patients=200)
        ledger.charge(charge(1))
        with pytest.raises(PolicyRefusal, match="its promise 2"):
            ledger.charge(charge(2))


def test_a_lower_ceiling_holds_for_what_was_spent_before(path: Path, ledger: Ledger) -> None:
    ledger.charge(charge(1))
    ledger.close()
    with open_ledger(path, Ceilings(epsilon_per_study=1.0, epsilon_total=1.0)) as stricter:
        with pytest.raises(PolicyRefusal, match="max_epsilon_per_study 1"):
            stricter.charge(charge(2))
        assert stricter.remaining(LUNGS).rounds_left == 0


def test_the_same_charge_again_is_free_and_a_new_attempt_is_not(ledger: Ledger) -> None:
    ledger.charge(charge(1))
    once = ledger.spent(LUNGS).study
    ledger.charge(charge(1))
    assert ledger.spent(LUNGS).study == once
    ledger.charge(charge(1, attempt="retraining"))
    assert ledger.spent(LUNGS).study > once


def test_a_charge_repeated_after_the_budget_is_used_up_still_stands(ledger: Ledger) -> None:
    for number in (1, 2, 3):
        ledger.charge(charge(number))
    ledger.charge(charge(3))


def test_an_attempt_cannot_be_charged_again_for_less(path: Path, ledger: Ledger) -> None:
    statistics = Charge(LUNGS, 1, "means", SampledGaussian(10.0, 1.0, 1), what="statistics")
    ledger.charge(statistics)
    with pytest.raises(PolicyRefusal, match="another cost"):
        ledger.charge(replace(statistics, cost=SampledGaussian(20.0, 1.0, 1)))


def test_a_training_cannot_leave_its_plan(ledger: Ledger) -> None:
    cheaper = SampledGaussian(50.0, 1.0, 4)
    with pytest.raises(PolicyRefusal, match="not those fixed") as refusal:
        ledger.charge(replace(charge(1), cost=cheaper))
    assert refusal.value.reason == "plan"
    with pytest.raises(PolicyRefusal, match="not those fixed"):
        ledger.charge(charge(1, study="c" * 64))


def test_a_plan_stays_when_patients_withdraw(ledger: Ledger) -> None:
    assert ledger.fix_plan(LUNGS, replace(PLAN, sampling_rate=0.5), patients=150) == PLAN


def test_delta_above_one_over_the_patients_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ConfigError, match=r"delta 0\.01 is above one over 200 patients"):
        ledger.fix_plan("c" * 64, replace(PLAN, delta=0.01), patients=200)


def test_remaining_tells_cost_and_rounds_before_training(ledger: Ledger) -> None:
    remaining = ledger.remaining(LUNGS)
    assert remaining.spent.study == 0
    assert remaining.after_next_round.study == pytest.approx(epsilon([PLAN.round_cost], 1e-5))
    assert remaining.rounds_left == 3
    ledger.charge(charge(1))
    assert ledger.remaining(LUNGS).rounds_left == 2


def test_rounds_known_to_fit_are_forgotten_when_another_study_spends(path: Path) -> None:
    with open_ledger(path, Ceilings(epsilon_per_study=3.0, epsilon_total=3.0)) as ledger:
        ledger.fix_plan(LUNGS, PLAN, patients=200)
        ledger.fix_plan(HEART, PLAN, patients=200)
        assert ledger.remaining(LUNGS).rounds_left == 3
        ledger.charge(charge(1, HEART))
        ledger.charge(charge(1))
        ledger.charge(charge(2))
        with pytest.raises(PolicyRefusal, match="max_epsilon_total"):
            ledger.charge(charge(3))


def test_no_more_rounds_are_allowed_than_were_counted(ledger: Ledger) -> None:
    left = ledger.remaining(LUNGS).rounds_left
    for number in range(left):
        ledger.charge(charge(number))
    with pytest.raises(PolicyRefusal, match="max_epsilon_per_study"):
        ledger.charge(charge(left))


def test_images_of_one_patient_are_added_up_unless_the_policy_counts_images(path: Path) -> None:
    plan = replace(PLAN, unit=Unit.IMAGE, sampling_rate=0.5, images_per_patient=2, steps_per_round=1)
    for unit, cost in ((Unit.PATIENT, plan.round_cost), (Unit.IMAGE, replace(plan.round_cost, images_per_patient=1))):
        with open_ledger(path.with_name(unit.value), Ceilings(3.0, 4.0, unit=unit)) as ledger:
            ledger.fix_plan(LUNGS, plan, patients=200)
            ledger.charge(Charge(LUNGS, 1, "t", plan.round_cost))
            assert ledger.spent(LUNGS).study == pytest.approx(epsilon([cost], 1e-5))


def test_nothing_leaves_before_it_is_charged(ledger: Ledger) -> None:
    with pytest.raises(PolicyRefusal, match="before its training is charged") as refusal:
        ledger.release(LUNGS, "a1", digest="d1", size=10)
    assert refusal.value.reason == "not charged"


def test_one_charge_releases_one_update_any_number_of_times(ledger: Ledger) -> None:
    ledger.charge(charge(1))
    ledger.release(LUNGS, "a1", digest="d1", size=10)
    ledger.release(LUNGS, "a1", digest="d1", size=10)
    with pytest.raises(PolicyRefusal, match="train and charge anew") as refusal:
        ledger.release(LUNGS, "a1", digest="d2", size=10)
    assert refusal.value.reason == "already released"


def test_a_restored_backup_is_refused_once_the_coordinator_has_countersigned_more(path: Path, ledger: Ledger) -> None:
    ledger.charge(charge(1))
    for file in path.parent.iterdir():
        shutil.copy(file, path.parent / f"{file.name}.backup")
    ledger.charge(charge(2))
    head = ledger.head
    ledger.countersign(head)
    ledger.close()
    for name in ("ledger.jsonl", "ledger.jsonl.head"):
        shutil.copy(path.with_name(f"{name}.backup"), path.with_name(name))
    with pytest.raises(PolicyRefusal, match="restored backup") as refusal:
        open_ledger(path)
    assert refusal.value.reason == "ledger restored"
    # With the countersigned file gone too, the coordinator's own record still tells.
    path.with_name("ledger.jsonl.countersigned").unlink()
    with open_ledger(path) as older, pytest.raises(PolicyRefusal, match="restored backup"):
        older.countersign(head)


def test_a_rewritten_history_of_the_same_length_is_refused(path: Path, ledger: Ledger) -> None:
    ledger.charge(charge(1))
    with pytest.raises(PolicyRefusal, match="countersigned"):
        ledger.countersign(Head(ledger.head.rows, "f" * 64))


def test_an_older_countersignature_does_not_replace_a_newer_one(path: Path, ledger: Ledger) -> None:
    older = ledger.head
    ledger.charge(charge(1))
    ledger.countersign(ledger.head)
    kept = path.with_name("ledger.jsonl.countersigned").read_bytes()
    ledger.countersign(older)
    ledger.countersign(Head(0, GENESIS))
    assert path.with_name("ledger.jsonl.countersigned").read_bytes() == kept


def test_a_ledger_that_vanished_is_refused_once_countersigned(path: Path, ledger: Ledger) -> None:
    ledger.countersign(ledger.head)
    ledger.close()
    path.unlink()
    path.with_name("ledger.jsonl.head").unlink()
    with pytest.raises(PolicyRefusal, match="countersigned"):
        open_ledger(path)


def test_a_broken_countersignature_is_named(path: Path, ledger: Ledger) -> None:
    ledger.close()
    path.with_name("ledger.jsonl.countersigned").write_bytes(b"[]")
    with pytest.raises(PolicyRefusal, match=r"ledger\.jsonl\.countersigned is not as it was written"):
        open_ledger(path)


def test_another_cohorts_ledger_is_refused(path: Path, ledger: Ledger) -> None:
    ledger.close()
    with pytest.raises(PolicyRefusal, match="another cohort"):
        open_ledger(path, cohort="children")
