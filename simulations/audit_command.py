"""``medfl-sim audit``: attacks on the product's own private step, beside what its accountant claims.

Every attack is also let loose on an unprotected step, where it must succeed: an attack that always fails shows nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from medfl.shared.command import parser, run
from medfl.shared.errors import ConfigError
from medfl.shared.privacy.settings import DpSgd, Engine, Unit

if TYPE_CHECKING:
    from rich.console import Console

    from medfl.shared.privacy.plan import TrainingPlan

_EXAMPLES = """\
  medfl-sim audit                               noise multiplier 1, as a start
  medfl-sim audit --noise-multiplier 0.7 --sampling-rate 0.05 --steps 200
  medfl-sim audit --json > audit.json           for a report"""

_NOTHING = 1e-3  # noise multiplier of a step that protects nobody
_ENOUGH_STEPS, _ENOUGH_RATE, _ENOUGH_DELTA = 50, 0.1, 1e-5  # one run without protection refutes 3 and more with these
LEARNT_BY_HEART = 0.7  # area under the curve that membership inference must reach without protection
UNRECOGNISABLE_DB = 20.0  # an inverted gradient below this shows no picture


class Rule(StrEnum):
    """How a measurement is held against its limit."""

    AT_MOST = "at most"
    AT_LEAST = "at least"
    ABOUT = "about"


@dataclass(frozen=True, slots=True)
class Line:
    """One measurement, what it is held against, and whether all is as promised."""

    test: str
    case: str
    rule: Rule
    limit: float
    measured: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work each attack does."""

    runs: int = 300  # of a step, for its noise and its canary
    canaries: int = 1000
    pictures: int = 200
    models: int = 16


@dataclass(frozen=True, slots=True)
class Report:
    """All measurements. ``epsilon`` is claimed for one patient, ``refuted`` is what one training run disproves."""

    plan: TrainingPlan
    epsilon: float
    refuted: float
    lines: tuple[Line, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every measurement is as promised and every attack worked where nothing protects."""
        return all(line.passed for line in self.lines) and self.refuted <= self.epsilon


def audit(
    plan: TrainingPlan,
    *,
    engine: Engine = Engine.BOOKKEEPING,
    sizes: Sizes | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Report:
    """Attack the product's step and training with the noise, sampling rate and steps of ``plan``.

    ``tell`` is called with the name of each attack before it begins.
    """
    from medfl.shared.privacy.accounting import epsilon

    started, sizes = time.monotonic(), sizes or Sizes()
    claimed = epsilon([plan.round_cost], plan.delta)
    tell("1 of 4: sensitivity, noise, seeds and canary of a step")
    step = list(_step(plan, engine, sizes))
    tell("2 of 4: a training with canaries, and one without protection")
    refuted, one_run = _one_run(plan, claimed, engine, sizes)
    tell("3 of 4: membership of patients in trained models")
    members = _membership(plan, engine, sizes)
    tell("4 of 4: pictures from gradients")
    lines = (*step, *one_run, *members, *_inversion(plan))
    return Report(plan, claimed, refuted, lines, time.monotonic() - started)


def _step(plan: TrainingPlan, engine: Engine, sizes: Sizes) -> Iterator[Line]:
    import torch
    from torch import nn

    from medfl.simulations.audit import Audit, audit_step, colliding_patients, real_step

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(100, 1))
    step = real_step(network, nn.functional.mse_loss, clip_norm=plan.clip_norm, engine=engine)
    patients = colliding_patients((1, 10, 10), lambda value: torch.full((1, 1), value))
    rules = {Audit.NOISE: Rule.ABOUT, Audit.SEEDS: Rule.ABOUT}
    for found in audit_step(step, patients, noise_multiplier=plan.noise_multiplier, runs=sizes.runs):
        rule = rules.get(found.audit, Rule.AT_MOST)
        yield Line(found.audit.value, found.case, rule, found.expected, found.measured, found.passed)


def _one_run(plan: TrainingPlan, claimed: float, engine: Engine, sizes: Sizes) -> tuple[float, list[Line]]:
    from medfl.simulations.one_run import audit_one_run, canary_step, epsilon_of

    def attacked(noise: float, rate: float, steps: int, delta: float) -> OneRun:
        return audit_one_run(
            canary_step(sizes.canaries, engine=engine),
            canaries=sizes.canaries,
            noise_multiplier=noise,
            sampling_rate=rate,
            steps=steps,
            delta=delta,
        )

    # Whether the attack works is no matter of the plan: few steps, or a large delta, leave it nothing to refute.
    bare = attacked(_NOTHING, _ENOUGH_RATE, _ENOUGH_STEPS, _ENOUGH_DELTA)
    found = attacked(plan.noise_multiplier, plan.sampling_rate, plan.steps_per_round, plan.delta)
    case = f"{sizes.canaries} canaries, {plan.steps_per_round} steps"
    implied = epsilon_of(found.mu, plan.delta)
    return found.epsilon, [
        Line("one run: epsilon refuted", "no protection", Rule.AT_LEAST, 1.0, bare.epsilon, bare.epsilon >= 1.0),
        Line("one run: epsilon refuted", case, Rule.AT_MOST, claimed, found.epsilon, found.epsilon <= claimed),
        Line("one run: Gaussian mu", case, Rule.AT_MOST, found.expected_mu, found.mu, found.passed),
        Line("one run: epsilon of mu", case, Rule.AT_MOST, claimed, implied, implied <= claimed or found.passed),
    ]


def _membership(plan: TrainingPlan, engine: Engine, sizes: Sizes) -> list[Line]:
    from medfl.simulations import membership

    settings = DpSgd(mode="dp-sgd", epsilon=1e4, expected_batch=plan.expected_batch, engine=engine)
    bare = membership.attack_membership(membership.unprotected, pictures=sizes.pictures, models=sizes.models)
    private = membership.attack_membership(
        membership.protected(settings, plan), pictures=sizes.pictures, models=sizes.models
    )
    area, area_margin = _largest_area(_mu(plan), sizes)
    chance = membership.FALSE_ALARMS
    found, found_margin = _most_found(_mu(plan), sizes, chance)
    what, few = "membership: area under the curve", "membership: found at 1 % false alarms"
    case = f"{sizes.models} models"
    return [
        Line(what, "no protection", Rule.AT_LEAST, LEARNT_BY_HEART, bare.area, bare.area >= LEARNT_BY_HEART),
        Line(what, case, Rule.AT_MOST, area, private.area, private.area <= area + area_margin),
        Line(few, "no protection", Rule.AT_LEAST, chance, bare.found, bare.found > chance),
        Line(few, case, Rule.AT_MOST, found, private.found, private.found <= found + found_margin),
    ]


def _mu(plan: TrainingPlan) -> float:
    """Of the Gaussian mechanism that the training is at most: many sampled steps are nearly one (Bu et al. 2020,
    https://arxiv.org/abs/1911.11607), and sampling does not make them tell more.
    """
    sampled = plan.sampling_rate * math.sqrt(math.expm1(min(700.0, plan.noise_multiplier**-2)))
    return math.sqrt(plan.steps_per_round) * min(sampled, 1 / plan.noise_multiplier)


def _largest_area(mu: float, sizes: Sizes) -> tuple[float, float]:
    """No attack on a ``mu``-Gaussian mechanism has a larger one; and five standard errors of an area."""
    from scipy.stats import norm

    return float(norm.cdf(mu / math.sqrt(2))), 5 * math.sqrt(1 / (3 * sizes.models * sizes.pictures))


def _most_found(mu: float, sizes: Sizes, alarms: float) -> tuple[float, float]:
    """No attack on a ``mu``-Gaussian mechanism finds a larger share of members at this share of false alarms; and five
    standard errors of that share: of its own count, and of the threshold, which others' count sets.
    """
    from scipy.stats import norm

    threshold, counted = norm.ppf(alarms), sizes.models * sizes.pictures / 2
    found = float(norm.cdf(mu + threshold))
    slope = float(math.exp(norm.logpdf(mu + threshold) - norm.logpdf(threshold)))
    variance = found * (1 - found) + slope**2 * alarms * (1 - alarms)
    return found, 5 * math.sqrt(variance / counted)


def _inversion(plan: TrainingPlan) -> list[Line]:
    from medfl.simulations import inversion

    limit = inversion.RECOGNISABLE_DB
    bare = inversion.attack_gradients(inversion.unprotected)
    clipped = inversion.attack_gradients(inversion.protected(1e-6))
    found = inversion.attack_gradients(inversion.protected(plan.noise_multiplier))
    lines = []
    for attack in ("division", "search"):
        what = f"gradient inversion by {attack}, dB"
        before, only_clip, after = (getattr(inverted, attack) for inverted in (bare, clipped, found))
        lines += [
            Line(what, "no protection", Rule.AT_LEAST, limit, before, before >= limit),
            Line(what, "clipped, no noise", Rule.AT_LEAST, limit, only_clip, only_clip >= limit),
            Line(what, "clipped and noised", Rule.AT_MOST, UNRECOGNISABLE_DB, after, after <= UNRECOGNISABLE_DB),
        ]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``medfl-sim audit``; returns 0 when all is as promised, 1 when something is not."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    return run("medfl-sim audit", lambda: _work(options))


def _parse(arguments: list[str]) -> argparse.Namespace:
    made = parser("medfl-sim audit", "Attack private training, beside what its accountant claims.", _EXAMPLES)
    made.add_argument("--noise-multiplier", type=float, default=1.0, metavar="X", help="noise over clip norm (1)")
    made.add_argument("--sampling-rate", type=float, default=0.1, metavar="X", help="share of patients a step (0.1)")
    made.add_argument("--steps", type=int, default=50, metavar="N", help="steps of the training (50)")
    made.add_argument("--delta", type=float, default=1e-5, metavar="X", help="delta of the claim (1e-5)")
    made.add_argument("--engine", choices=[engine.value for engine in Engine], default="bookkeeping")
    made.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return made.parse_args(arguments)


def _work(options: argparse.Namespace) -> int:
    import medfl.shared.environment  # noqa: F401 - before flwr

    # isort: split
    import torch
    from rich.console import Console

    from medfl.shared.logs import quiet_libraries, set_up_logs

    set_up_logs(json_lines=options.log_format == "json", verbose=options.verbose, file=options.log_file)
    quiet_libraries()
    torch.set_num_threads(1)  # small steps: more threads only wait for each other
    plan = plan_of(
        noise_multiplier=options.noise_multiplier,
        sampling_rate=options.sampling_rate,
        steps=options.steps,
        delta=options.delta,
    )
    with Console(stderr=True).status("starting") as status:
        report = audit(plan, engine=Engine(options.engine), tell=status.update)
    if options.json:
        print(as_json(report))
    else:
        show(Console(), report)
    return 0 if report.passed else 1


def plan_of(*, noise_multiplier: float, sampling_rate: float, steps: int, delta: float) -> TrainingPlan:
    """A training to audit. Raises ConfigError where a number is out of range."""
    from medfl.shared.privacy.accounting import SampledGaussian, check_delta
    from medfl.shared.privacy.plan import TrainingPlan

    SampledGaussian(noise_multiplier, sampling_rate, steps)  # checks them
    check_delta(delta)
    if steps > 100_000:
        raise ConfigError(f"--steps {steps} would take hours: give 100000 or fewer")
    half = Sizes().pictures / 2  # of the membership test's pictures take part in a training
    return TrainingPlan(Unit.PATIENT, 1e4, delta, 1.0, noise_multiplier, sampling_rate, sampling_rate * half, steps)


def as_json(report: Report) -> str:
    """The report for machines."""
    content = {
        "claimed_epsilon": report.epsilon,
        "refuted_epsilon": report.refuted,
        "delta": report.plan.delta,
        "noise_multiplier": report.plan.noise_multiplier,
        "sampling_rate": report.plan.sampling_rate,
        "steps": report.plan.steps_per_round,
        "passed": report.passed,
        "seconds": round(report.seconds, 1),
        "findings": [asdict(line) for line in report.lines],
    }
    return json.dumps(content, indent=2, allow_nan=False)


def show(console: Console, report: Report) -> None:
    """The report for people."""
    from rich.table import Table

    plan = report.plan
    console.print(
        f"claimed for one patient: epsilon {report.epsilon:.2f} at delta {plan.delta:g} (noise multiplier "
        f"{plan.noise_multiplier:g}, sampling rate {plan.sampling_rate:g}, {plan.steps_per_round} steps)",
        highlight=False,
    )
    console.print(f"one training run refutes any epsilon below {report.refuted:.2f} (95 %)", highlight=False)
    table = Table("test", "case", "should be", "measured", "")
    for line in report.lines:
        verdict = "ok" if line.passed else "[bold red]NOT AS PROMISED[/bold red]"
        table.add_row(line.test, line.case, f"{line.rule.value} {line.limit:.3g}", f"{line.measured:.3g}", verdict)
    console.print(table)
    console.print("a limit is passed only beyond five standard errors of the measurement", highlight=False)
    failed = sum(not line.passed for line in report.lines)
    console.print(
        f"{failed} of {len(report.lines)} tests are not as promised: do not rely on this step"
        if failed
        else f"all {len(report.lines)} tests are as promised, and every attack worked where nothing protects",
        highlight=False,
    )
    console.print(f"{report.seconds:.0f} s", highlight=False)


if TYPE_CHECKING:
    from medfl.simulations.one_run import OneRun

if __name__ == "__main__":
    sys.exit(main())
