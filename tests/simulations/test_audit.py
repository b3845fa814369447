"""The audits pass the real step, and flag every planted bug; the table below says which audit flags which."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medfl.client.privacy import patient_gradient
from medfl.client.privacy.bookkeeping import engine as bookkeeping
from medfl.client.privacy.clipped import ClippedSum, UnitData, clip_factors, clipped_sum_by_loop
from medfl.client.privacy.randomness import SecureGenerator, noisy
from medfl.shared.privacy.settings import Engine
from medfl.simulations import audit
from medfl.simulations.audit import Audit, Step

CLIP = 0.5
NOISE = 1.0
Plant = Callable[[pytest.MonkeyPatch, Step], Step]


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs - labels).square().mean()


def real_step(engine: Engine = Engine.BOOKKEEPING) -> Step:
    torch.manual_seed(0)
    return audit.real_step(nn.Sequential(nn.Flatten(), nn.Linear(100, 1)), squared_error, clip_norm=CLIP, engine=engine)


def patients() -> list[UnitData]:
    return audit.colliding_patients((1, 10, 10), lambda value: torch.full((1, 1), value))


def flags(step: Step) -> set[Audit]:
    findings = audit.audit_step(step, patients(), noise_multiplier=NOISE, runs=350)
    return {finding.audit for finding in findings if not finding.passed}


@pytest.mark.parametrize("engine", list(Engine))
def test_the_real_step_passes_every_audit(engine: Engine) -> None:
    assert flags(real_step(engine)) == set()


def test_the_canary_measures_the_promised_mu() -> None:
    # mu = 1 / noise multiplier = 0.5; the standard error at 1,000 runs is sqrt((2 + 0.125) / 1000) = 0.046
    finding = audit.canary(real_step(), patients(), noise_multiplier=2.0, runs=1000)
    assert finding.measured == pytest.approx(0.5, abs=5 * 0.046)


def halved_noise(patch: pytest.MonkeyPatch, step: Step) -> Step:
    patch.setattr(patient_gradient, "noisy", lambda total, scale, *rest, **more: noisy(total, scale / 2, *rest, **more))
    return step


def no_clip(patch: pytest.MonkeyPatch, step: Step) -> Step:
    patch.setattr(bookkeeping, "clip_factors", lambda norms, clip_norm: torch.ones_like(norms))
    return step


def double_clip(patch: pytest.MonkeyPatch, step: Step) -> Step:
    patch.setattr(bookkeeping, "clip_factors", lambda norms, clip_norm: clip_factors(norms, 2 * clip_norm))
    return step


def clip_of_the_sum(patch: pytest.MonkeyPatch, step: Step) -> Step:
    def summed(network: nn.Module, loss: object, units: Sequence[UnitData], clip: float, _: Engine) -> ClippedSum:
        whole = clipped_sum_by_loop(network, squared_error, units, 1e9)
        return replace(whole, flat=whole.flat * clip_factors(whole.flat.norm(), clip))

    patch.setattr(patient_gradient, "clipped_sum", summed)
    return step


def noise_divided_by_the_batch(patch: pytest.MonkeyPatch, step: Step) -> Step:
    drawn = [1]

    def counted(batch: Sequence[UnitData], noise_multiplier: float) -> Tensor:
        drawn[0] = max(1, len(batch))
        return step(batch, noise_multiplier)

    def divided(total: Tensor, scale: float, generator: SecureGenerator, **more: Any) -> Tensor:
        return noisy(total, scale / drawn[0], generator, **more)

    patch.setattr(patient_gradient, "noisy", divided)
    return counted


def reused_seed(patch: pytest.MonkeyPatch, step: Step) -> Step:
    def seeded(total: Tensor, scale: float, generator: object, *, divisor: float, in_place: bool) -> Tensor:
        return (total + scale * torch.randn(total.shape)) / divisor

    patch.setattr(patient_gradient, "noisy", seeded)
    return step


def no_noise_on_an_empty_batch(patch: pytest.MonkeyPatch, step: Step) -> Step:
    return lambda batch, noise_multiplier: step(batch, noise_multiplier if batch else 1e-9)


WHICH_AUDIT_FLAGS_WHICH_BUG: list[tuple[Plant, set[Audit]]] = [
    (halved_noise, {Audit.NOISE, Audit.CANARY}),
    (no_clip, {Audit.SENSITIVITY, Audit.CANARY}),
    (double_clip, {Audit.SENSITIVITY, Audit.CANARY}),
    (clip_of_the_sum, {Audit.SENSITIVITY}),
    (noise_divided_by_the_batch, {Audit.NOISE, Audit.CANARY}),
    (reused_seed, {Audit.SEEDS}),
    (no_noise_on_an_empty_batch, {Audit.NOISE}),
]


@pytest.mark.parametrize(
    ("plant", "flagged"), WHICH_AUDIT_FLAGS_WHICH_BUG, ids=lambda value: getattr(value, "__name__", "")
)
def test_each_planted_bug_is_flagged(plant: Plant, flagged: set[Audit], monkeypatch: pytest.MonkeyPatch) -> None:
    assert flagged <= flags(plant(monkeypatch, real_step()))


def test_the_manual_says_which_audit_flags_which_bug() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "privacy.md").read_text("utf-8")
    table = text[text.index("| planted bug |") :].partition("\n\n")[0].splitlines()[2:]
    told = [set(row.strip("| ").split(" | ")[1].split(", ")) for row in table]
    assert told == [{audit.value for audit in flagged} for _, flagged in WHICH_AUDIT_FLAGS_WHICH_BUG]
