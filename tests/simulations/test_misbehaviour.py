"""Sites that fail or cheat, as the coordinator sees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tiny import classes_study, labels_study, site_data

from medfl.client.data.splits import Split
from medfl.client.site import Site
from medfl.server import secure
from medfl.server.secagg.outcome import SecureSum, SumPlan
from medfl.server.secure_exchange import GridExchange
from medfl.shared.errors import DataError, TrainingError
from medfl.shared.messages import EvaluateReply, ModelRequest, Ready
from medfl.shared.secagg.announcement import Purpose
from medfl.shared.secagg.exchange import Phase, PhaseRequest
from medfl.simulations.config import Attacker, Failures
from medfl.simulations.federation import Federation, federate
from medfl.simulations.misbehaviour import changed_update, with_flipped_labels

STEP = np.array([1.0, -2.0], np.float32)


def test_a_flipped_update_points_the_other_way() -> None:
    assert changed_update(STEP, Attacker(kind="sign-flip", scale=3.0), "x").tolist() == [-3.0, 6.0]


def test_noise_is_as_large_as_the_update_times_its_scale_and_differs_by_round() -> None:
    step = np.linspace(-1, 1, 10_000, dtype=np.float32)
    first, second = (changed_update(step, Attacker(kind="noise", scale=2.0), s) - step for s in ("1", "2"))
    assert first.std() == pytest.approx(2 * step.std(), rel=0.03)
    assert not np.array_equal(first, second)


def test_flipped_labels_are_the_training_parts_only() -> None:
    data = site_data(classes_study())
    flipped = with_flipped_labels(data, 2)
    assert torch.equal(flipped.splits[Split.TRAIN].labels, 1 - data.splits[Split.TRAIN].labels)
    assert torch.equal(flipped.splits[Split.VALIDATION].labels, data.splits[Split.VALIDATION].labels)
    with pytest.raises(DataError, match="one class"):
        with_flipped_labels(site_data(labels_study()), 2)


def run(failures: Failures, rounds: int = 20) -> Federation:
    study = classes_study(rounds={"count": rounds, "minimum_sites": 1, "evaluate_every": rounds})
    sites = {name: site_data(study, seed=n) for n, name in enumerate("abcd")}
    return federate(study, sites, failures=failures)


def test_sites_fail_about_as_often_as_asked_and_the_same_every_time() -> None:
    first, again = (run(Failures(drop_out=0.3)) for _ in range(2))
    failed = sum(why == "no answer" for r in first.rounds for why in r.outcomes.values())
    assert 80 * 0.3 - 3 * 4.1 < failed < 80 * 0.3 + 3 * 4.1  # binomial: standard deviation sqrt(80 * 0.3 * 0.7)
    assert [r.outcomes for r in first.rounds] == [r.outcomes for r in again.rounds]
    assert np.array_equal(first.result.weights, again.result.weights)


def test_a_late_site_has_trained_and_one_that_dropped_out_has_not() -> None:
    def trained(federation: Federation) -> int:
        return sum(row["set"] == "train" for rows in federation.site_rows.values() for row in rows)

    for failures, worked in ((Failures(late=0.3), 80), (Failures(drop_out=0.3), None)):
        federation = run(failures)
        arrived = sum(why == "trained" for r in federation.rounds for why in r.outcomes.values())
        assert arrived < 80
        assert trained(federation) == (worked or arrived)


def test_drop_outs_leave_the_same_model_under_secure_aggregation_as_in_clear() -> None:
    def model(mode: str) -> tuple[list[dict[str, str]], np.ndarray]:
        study = classes_study(
            rounds={"count": 6, "minimum_sites": 3, "evaluate_every": 6}, secure_aggregation={"mode": mode}
        )
        sites = {name: site_data(study, seed=n) for n, name in enumerate("abcde")}
        federation = federate(study, sites, failures=Failures(drop_out=0.25))
        return [dict(r.outcomes) for r in federation.rounds], federation.result.weights

    clear, secure = model("none"), model("msa1")
    assert any(why == "no answer" for outcomes in clear[0] for why in outcomes.values())
    assert secure[0] == clear[0]  # the same sites fail in the same rounds
    np.testing.assert_allclose(secure[1], clear[1], atol=1e-6)


def secure_run(seed: int = 0, rounds: int = 4, **phases: float) -> Federation:
    study = classes_study(
        seed=seed,
        rounds={"count": rounds, "minimum_sites": 3, "evaluate_every": 2},
        secure_aggregation={"mode": "msa1"},
    )
    sites = {name: site_data(study, seed=n) for n, name in enumerate("abcdefg")}
    return federate(study, sites, failures=Failures(phases={Phase(name): share for name, share in phases.items()}))


def test_sites_are_lost_inside_the_phases_of_a_secure_sum_and_the_same_every_time() -> None:
    first, again = (secure_run(masked_input=0.1, confirm_survivors=0.05, unmask=0.05) for _ in range(2))
    assert first.result.ending.value == "done"
    assert len(first.rounds) == 4
    words = [word for report in first.rounds for word in report.outcomes.values()]
    assert "left the secure sum: protocol: unavailable" in words
    assert [r.outcomes for r in first.rounds] == [r.outcomes for r in again.rounds]
    assert np.array_equal(first.result.weights, again.result.weights)  # sums of integers: the same bits


def test_the_model_of_a_sum_that_lost_a_site_is_the_mean_of_the_others() -> None:
    lossy = secure_run(rounds=1, masked_input=0.15)
    stayed = {site for site, word in lossy.rounds[0].outcomes.items() if word == "trained"}
    assert 3 <= len(stayed) < 7
    study = classes_study(rounds={"count": 1, "minimum_sites": 3, "evaluate_every": 2})
    sites = {name: site_data(study, seed=n) for n, name in enumerate("abcdefg")}
    clear = federate(study, {name: data for name, data in sites.items() if name in stayed})
    np.testing.assert_allclose(lossy.result.weights, clear.result.weights, atol=1e-6)


@pytest.mark.parametrize("phase", list(Phase))
def test_every_phase_can_lose_sites_and_the_study_still_ends(phase: Phase) -> None:
    federation = secure_run(rounds=3, **{phase.value: 0.15})
    assert federation.result.ending.value == "done"
    assert all(sum(word == "trained" for word in report.outcomes.values()) >= 3 for report in federation.rounds)


@pytest.mark.parametrize("phase", list(Phase))
def test_scores_that_were_lost_inside_a_sum_are_summed_again_after_the_last_round(
    phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums: list[str] = []  # what became of each sum of scores
    inner, outcome_of = GridExchange.__call__, secure.summed

    def summed(plan: SumPlan, **given: Any) -> SecureSum:
        if plan.purpose is not Purpose.EVALUATE:
            return outcome_of(plan, **given)
        sums.append("void")
        total = outcome_of(plan, **given)
        sums[-1] = "summed"
        return total

    def exchange(self: GridExchange, asked: Phase, requests: Mapping[int, PhaseRequest], /) -> Any:
        return iter(()) if sums == ["void"] and asked is phase else inner(self, asked, requests)

    monkeypatch.setattr(secure, "summed", summed)
    monkeypatch.setattr(GridExchange, "__call__", exchange)
    federation = secure_run(rounds=1)
    assert sums == ["void", "summed"]
    assert "accuracy" in federation.rounds[-1].scores


def test_scores_are_asked_for_again_after_the_last_round_where_too_few_sites_were_ready_for_a_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, inner = Counter[str](), Site.evaluate

    def evaluate(self: Site, request: ModelRequest) -> EvaluateReply | Ready:
        asked[self.name] += 1
        if asked[self.name] == 1 and self.name in "abcde":
            raise TrainingError("the device has no memory left")
        return inner(self, request)

    monkeypatch.setattr(Site, "evaluate", evaluate)
    federation = secure_run(rounds=1)
    assert dict(asked) == dict.fromkeys("abcdefg", 2)
    assert "accuracy" in federation.rounds[-1].scores
