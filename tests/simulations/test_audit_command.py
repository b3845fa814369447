from __future__ import annotations

import json

import pytest
from rich.console import Console

from medfl.client.privacy import patient_gradient
from medfl.client.privacy.randomness import noisy
from medfl.shared.errors import ConfigError
from medfl.shared.privacy.accounting import SampledGaussian, epsilon
from medfl.shared.privacy.plan import TrainingPlan
from medfl.shared.privacy.settings import Engine
from medfl.simulations import audit_command, membership
from medfl.simulations.audit_command import Line, Report, Rule, Sizes, as_json, audit, main, plan_of, show
from medfl.simulations.cli import main as simulate
from medfl.simulations.membership import Membership

SMALL = Sizes(runs=100, canaries=500, pictures=100, models=6)
NOISE, RATE, STEPS = 1.5, 0.1, 20


TOLD: list[str] = []


@pytest.fixture(scope="module")
def report() -> Report:
    plan = plan_of(noise_multiplier=NOISE, sampling_rate=RATE, steps=STEPS, delta=1e-5)
    return audit(plan, sizes=SMALL, tell=TOLD.append)


def test_each_attack_is_named_when_it_begins(report: Report) -> None:
    assert report.passed
    assert [told[:6] for told in TOLD] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]


def test_the_products_step_is_as_promised_and_every_attack_works_without_protection(report: Report) -> None:
    assert [line for line in report.lines if not line.passed] == []
    assert report.passed
    assert sum(line.case == "no protection" for line in report.lines) == 5


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"), [(1, 0.1, 1, 1e-5), (20, 0.1, 2, 1e-5), (1, 0.1, 20, 0.01)]
)
def test_few_steps_or_a_large_delta_do_not_disarm_the_attack_without_protection(
    noise: float, rate: float, steps: int, delta: float
) -> None:
    plan = plan_of(noise_multiplier=noise, sampling_rate=rate, steps=steps, delta=delta)
    claimed = epsilon([plan.round_cost], plan.delta)
    _, lines = audit_command._one_run(plan, claimed, Engine.BOOKKEEPING, SMALL)
    assert [line for line in lines if not line.passed] == []


def found_members(monkeypatch: pytest.MonkeyPatch, plan: TrainingPlan, found: float) -> Line:
    """What the audit says where an attack on the private training finds this share of members."""
    monkeypatch.setattr(
        membership,
        "attack_membership",
        lambda train, **_: Membership(0.5, 0.16 if train is membership.unprotected else found, 200, 16),
    )
    return audit_command._membership(plan, Engine.BOOKKEEPING, Sizes())[-1]


def test_members_may_be_found_as_often_as_the_noise_allows_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # mu = 0.1 * sqrt(50 * (e - 1)) = 0.927: Phi(0.927 - 2.326) = 0.081. Of 1,600 members' share the standard error is
    # 0.0068, and 5.62 times the 0.0025 of the alarms' gives 0.0140: sqrt(0.0068**2 + 0.0140**2) = 0.0155
    few = plan_of(noise_multiplier=1, sampling_rate=0.1, steps=50, delta=1e-5)
    line = found_members(monkeypatch, few, 0.15)
    assert (line.limit, line.passed) == (pytest.approx(0.081, abs=5e-4), True)
    assert not found_members(monkeypatch, few, 0.17).passed
    # whoever is in every step, or hardly hidden, may be found by everybody
    for plan in (
        plan_of(noise_multiplier=1, sampling_rate=1, steps=50, delta=1e-5),
        plan_of(noise_multiplier=0.05, sampling_rate=0.1, steps=20, delta=1e-5),
    ):
        assert found_members(monkeypatch, plan, 0.9).passed
    # mu = sqrt(2) / 20 = 0.0707 where all are in both steps: no more than 0.0121, and 0.0200 of five standard errors
    hidden = plan_of(noise_multiplier=20, sampling_rate=1, steps=2, delta=1e-5)
    assert found_members(monkeypatch, hidden, 0.03).passed
    assert not found_members(monkeypatch, hidden, 0.035).passed


def test_the_claim_is_the_accountants_and_stands_beside_what_one_run_refutes(report: Report) -> None:
    assert report.epsilon == epsilon([SampledGaussian(NOISE, RATE, STEPS)], 1e-5)
    assert 0 <= report.refuted < report.epsilon


def test_the_report_is_readable_by_people_and_by_machines(report: Report) -> None:
    console = Console(record=True, width=120)
    show(console, report)
    text = console.export_text()
    assert f"claimed for one patient: epsilon {report.epsilon:.2f} at delta 1e-05" in text
    assert "every attack worked where nothing protects" in text
    content = json.loads(as_json(report))
    assert content["passed"] is True
    assert content["claimed_epsilon"] == report.epsilon
    assert {"test", "case", "rule", "limit", "measured", "passed"} == set(content["findings"][0])


def test_a_broken_step_ends_with_status_1_and_says_which_tests_it_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        patient_gradient, "noisy", lambda total, scale, *rest, **more: noisy(total, scale / 4, *rest, **more)
    )
    monkeypatch.setattr(audit_command, "Sizes", lambda: SMALL)
    monkeypatch.setattr(audit_command, "_membership", lambda *_: [])  # neither measures the noise
    monkeypatch.setattr(audit_command, "_inversion", lambda *_: [])
    assert simulate(["audit", "--json", "--steps", "20"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["passed"] is False
    flagged = {finding["test"] for finding in content["findings"] if not finding["passed"]}
    assert {"noise", "canary"} <= flagged


def test_an_attack_that_fails_without_protection_is_not_as_promised(report: Report) -> None:
    bare = [line for line in report.lines if line.case == "no protection"]
    assert all(line.rule is Rule.AT_LEAST and line.measured >= line.limit for line in bare)


@pytest.mark.parametrize(
    "arguments", [["--noise-multiplier", "0"], ["--sampling-rate", "2"], ["--delta", "1"], ["--steps", "0"]]
)
def test_numbers_that_make_no_sense_are_a_configuration_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "medfl-sim audit: " in capsys.readouterr().err


def test_an_audit_that_would_take_hours_is_refused() -> None:
    with pytest.raises(ConfigError, match="would take hours"):
        plan_of(noise_multiplier=1, sampling_rate=0.1, steps=10**6, delta=1e-5)
