"""What leaves is what is said to leave: the list beside real replies, and beside the manual."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from sites import evaluate, make_site, offer, policy_for, train
from tiny import classes_study

from medfl.client.policy import Policy
from medfl.client.releases import Treatment, releases, told
from medfl.shared.messages import EvaluateReply, TrainReply
from medfl.shared.study import Study

DP: dict[str, Any] = {"mode": "dp-sgd", "epsilon": 8, "delta": 1e-2, "noise_multiplier": 2.0, "expected_batch": 2}
CLIENT_LEVEL: dict[str, Any] = {"mode": "client-level", "epsilon": 8, "noise_multiplier": 6}
SECURE: dict[str, Any] = {"mode": "msa1"}
OPEN = Policy(release_site_metrics=True)
MANUAL = Path(__file__).parents[2] / "docs" / "privacy.md"


def treatment(what: str, study: Study, policy: Policy = OPEN) -> Treatment:
    (found,) = [release.treatment for release in releases(study, policy) if what in release.what]
    return found


@pytest.mark.parametrize("privacy", [DP, CLIENT_LEVEL])
def test_under_privacy_nothing_exact_about_patients_leaves_whatever_the_policy_says(privacy: dict[str, Any]) -> None:
    for release in releases(classes_study(privacy=privacy, secure_aggregation=SECURE), OPEN):
        if "code" not in release.what and "time" not in release.what:
            assert release.treatment in (Treatment.OFF, Treatment.PLANNED, Treatment.NOISED), release.what


def test_without_privacy_a_secure_sum_is_what_becomes_known() -> None:
    study = classes_study(secure_aggregation=SECURE)
    for what in ("trained weights", "weight in the mean", "training loss", "scores", "cut"):
        assert treatment(what, study, Policy()) is Treatment.SUMMED


def test_the_list_agrees_with_what_a_site_sends(tmp_path: Path) -> None:
    for number, (study, open_) in enumerate(
        [(classes_study(), False), (classes_study(), True), (classes_study(privacy={**DP, "steps_per_round": 1}), True)]
    ):
        budget = {"max_epsilon_per_study": 8, "max_epsilon_total": 8, "max_delta": 1e-2}
        policy = policy_for(study, release_site_metrics=open_, **budget)
        site = make_site(study, tmp_path / str(number), policy=policy)
        offer(site, study)
        trained, scored = TrainReply.parse(train(site, study)), EvaluateReply.parse(evaluate(site, study))
        site.close()
        assert bool(trained.tally) is (treatment("training loss", study, policy) is Treatment.EXACT)
        assert bool(scored.tally) is (treatment("scores", study, policy) is Treatment.EXACT)
        assert (trained.examples == 1) is (treatment("weight in the mean", study, policy) is Treatment.PLANNED)


def test_control_variates_leave_as_bare_as_the_update() -> None:
    assert treatment("beside", classes_study()) is Treatment.OFF
    assert treatment("beside", classes_study(strategy={"name": "scaffold"})) is Treatment.EXACT


def test_what_leaves_is_told_when_a_study_is_accepted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medfl.site")
    study = classes_study()
    offer(make_site(study, tmp_path), study)
    assert told(study, policy_for(study)) in caplog.text
    assert "exact: update of the trained weights, " in caplog.text
    assert "training loss" not in caplog.text  # it stays here


def test_the_manual_lists_exactly_this() -> None:
    private = classes_study(privacy=DP, secure_aggregation=SECURE)
    columns = [
        releases(private, Policy()),
        releases(classes_study(privacy=CLIENT_LEVEL, secure_aggregation=SECURE), Policy()),
        releases(classes_study(secure_aggregation=SECURE), Policy()),
        releases(classes_study(), Policy()),
    ]
    lines = [
        f"| {row[0].what} | {' | '.join(release.treatment.value for release in row)} |"
        for row in zip(*columns, strict=True)
    ]
    assert "\n".join(lines) in MANUAL.read_text(encoding="utf-8")
