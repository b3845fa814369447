"""A study in words: 80 columns, the figures that decide, and nothing that a coordinator could smuggle in."""

from __future__ import annotations

import datetime
from typing import Any

from tiny import LOGISTIC_VALUES, classes_study, masks_study

from medfl.client.approvals import Approvals, Decision, Standing
from medfl.client.explain import explain, next_step
from medfl.client.policy import Policy
from medfl.shared.study import Study

TODAY = datetime.date(2027, 5, 1)
OPEN = Policy(allow_no_privacy=True, require_secure_aggregation=False, max_epsilon_total=12)
PRIVATE = masks_study(
    privacy={"mode": "dp-sgd", "epsilon": 4.0, "delta": 1e-6, "expected_batch": 32, "steps_per_round": 7},
    secure_aggregation={"mode": "msa1", "ring_bits": 16},
    rounds={"count": 20, "minimum_sites": 4},
)


def told(study: Study, policy: Policy = OPEN, approvals: Approvals | None = None) -> str:
    lines = explain(study, approvals or Approvals(policy), policy, spent_total=2.31, today=TODAY)
    assert all(len(line) <= 80 for line in lines), max(lines, key=len)
    return " ".join(" ".join(lines).split())


def test_the_figures_are_those_of_the_study() -> None:
    said = told(classes_study())
    # 34 values of 4 bytes are 136 bytes a round, twice
    assert f"{LOGISTIC_VALUES} values: 0.000136 MB leave and 0.000136 MB come each round, 2 times at most" in said
    assert "2 rounds of 2 steps in batches of 8, at least 2 sites each" in said
    assert "in clear: the coordinator sees this site's own update" in said
    assert "none: no noise" in said
    assert "2.31 of the 12 that this site allows in all are spent" in said


def test_the_price_and_the_protection_of_a_private_study_are_told() -> None:
    policy = Policy(max_epsilon_per_study=5, max_epsilon_total=12, max_delta=1e-5, minimum_cohort=6)
    said = told(PRIVATE, policy)
    assert "differential privacy for each patient: epsilon 4 at delta 1e-06 over the whole study" in said
    assert "at most 4, and this site allows 5 a study" in said
    assert "20 rounds of 7 steps, each on 32 patients on average" in said
    assert "the sum over 6 sites or more, and no single update" in said
    assert "permits it once it is approved" in said


def test_what_the_policy_forbids_is_told_before_anybody_approves_it() -> None:
    assert "forbids it, approved or not:" in told(PRIVATE, Policy(max_epsilon_per_study=3))


def test_who_answers_for_a_study_is_told_or_that_nobody_said_so() -> None:
    said = told(
        classes_study(
            responsible="Prof. A. Example, University Hospital North",
            legal_basis="Art. 9(2)(j) GDPR",
            ethics="2026-123",
            recipients="the four hospitals, DE and FR",
            last_day="2027-06-30",
        )
    )
    for words in ("Prof. A. Example", "Art. 9(2)(j) GDPR", "2026-123", "DE and FR", "2027-06-30"):
        assert words in said
    assert told(classes_study()).count("not written") == 5  # the purpose too


def test_an_unbroken_word_or_many_lines_do_not_break_the_page() -> None:
    told(classes_study(purpose="x" * 2000))
    told(classes_study(purpose="a\n" * 500))


def test_the_decision_is_shown_with_who_made_it_and_what_comes_next() -> None:
    study, approvals = classes_study(), Approvals(OPEN)
    assert "approve" in next_step(study, Standing.PENDING)
    decided: dict[str, Any] = {
        "by": "Dr B",
        "ethics": "2027-12",
        "at": datetime.datetime(2027, 5, 1, 9, tzinfo=datetime.UTC),
    }
    approvals.decide(study.digest, Decision(approved=True, **decided))
    assert "approved by Dr B on 2027-05-01 09:00 UTC, ethics vote 2027-12" in told(study, approvals=approvals)
    assert "withdraw" in next_step(study, Standing.APPROVED)
