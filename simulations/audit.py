"""Does the private step do what the accountant assumes? Four tests of a step as a black box; each says what it saw.

A step under audit is run on made-up patients whose gradients are known to collide, dominate and cancel. Limits are set
at five standard errors: a correct step fails about once in a million runs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor, nn

from medfl.client.privacy.clipped import LossFunction, UnitData, trainable
from medfl.client.privacy.patient_gradient import private_gradients
from medfl.client.privacy.randomness import SecureGenerator
from medfl.shared.privacy.settings import Engine

STANDARD_ERRORS = 5.0

Step = Callable[[Sequence[UnitData], float], Tensor]
"""(patients, noise multiplier) -> the released noisy sum of clipped gradients, flat, in clip norms."""


class Audit(StrEnum):
    """What is tested."""

    SENSITIVITY = "sensitivity"  # almost without noise, leaving one patient out moves the sum by one clip norm at most
    NOISE = "noise"  # variance on empty and non-empty batches
    SEEDS = "seeds"  # known seeds do not make the noise repeat
    CANARY = "canary"  # how well one step tells whether one patient was in it


@dataclass(frozen=True, slots=True)
class Finding:
    """One test's result: ``measured`` should be ``expected``, or at most that for sensitivity and canary."""

    audit: Audit
    case: str
    expected: float
    measured: float
    passed: bool


def real_step(network: nn.Module, loss: LossFunction, *, clip_norm: float, engine: Engine = Engine.BOOKKEEPING) -> Step:
    """The product's own step on ``network``, for auditing. ``p.grad`` is overwritten, weights are not."""
    generator, expected = SecureGenerator(), 4.0

    def step(patients: Sequence[UnitData], noise_multiplier: float) -> Tensor:
        private_gradients(
            network,
            loss,
            patients,
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            expected_patients=expected,
            generator=generator,
            engine=engine,
        )
        gradients = [parameter.grad for parameter in trainable(network) if parameter.grad is not None]
        return torch.cat([g.reshape(-1).double() for g in gradients]) * (expected / clip_norm)

    return step


def audit_step(step: Step, patients: Sequence[UnitData], *, noise_multiplier: float, runs: int = 300) -> list[Finding]:
    """Run every audit of ``step``. ``patients``: see :func:`colliding_patients`; ``runs`` releases of each kind."""
    return [
        sensitivity(step, patients),
        noise_scale(step, [], noise_multiplier=noise_multiplier, runs=runs),
        noise_scale(step, patients, noise_multiplier=noise_multiplier, runs=runs),
        seed_independence(step, patients, noise_multiplier=noise_multiplier),
        canary(step, patients, noise_multiplier=noise_multiplier, runs=runs),
    ]


def colliding_patients(shape: Sequence[int], labels: Callable[[float], Tensor]) -> list[UnitData]:
    """Patients that expose a wrong clip: small and huge gradients, and huge ones that point against each other.

    Args:
        shape: of one image, without the row axis.
        labels: (value) -> labels of one row, such that opposite values pull the gradient in opposite directions.
    """
    image = torch.linspace(-1, 1, math.prod(shape)).reshape(1, *shape)
    strengths = (1e-3, 1.0, -1.0, 50.0, -100.0)
    return [(image, labels(strength)) for strength in strengths]


def sensitivity(step: Step, patients: Sequence[UnitData]) -> Finding:
    """Largest change of the (all but) noiseless sum when one patient is left out, over all and over pairs."""
    tiny = 1e-6  # noise of norm 1e-6 * sqrt(parameters), far below the margin
    everyone = list(patients)
    pairs = [[a, b] for a in everyone for b in everyone]
    worst = 0.0
    for batch in [everyone, *pairs]:
        whole = step(batch, tiny)
        for left_out in range(len(batch)):
            rest = step(batch[:left_out] + batch[left_out + 1 :], tiny)
            worst = max(worst, float((whole - rest).norm()))
    return Finding(Audit.SENSITIVITY, "one patient fewer", 1.0, worst, worst <= 1.001)


def noise_scale(step: Step, patients: Sequence[UnitData], *, noise_multiplier: float, runs: int) -> Finding:
    """Standard deviation of the noise, in promised ones, from differences of releases on the same patients."""
    draws = torch.stack([step(patients, noise_multiplier) for _ in range(runs)])
    differences = (draws[0::2] - draws[1::2]) / (math.sqrt(2) * noise_multiplier)
    measured = float(differences.square().mean().sqrt())
    margin = STANDARD_ERRORS / math.sqrt(2 * differences.numel())
    case = "empty batch" if not patients else f"{len(patients)} patients"
    return Finding(Audit.NOISE, case, 1.0, measured, abs(measured - 1) <= margin)


def seed_independence(step: Step, patients: Sequence[UnitData], *, noise_multiplier: float) -> Finding:
    """Spread of releases made after seeding every public generator alike, in the spread of independent ones."""
    draws = []
    with torch.random.fork_rng():
        for _ in range(20):
            _seed_everything(7)
            draws.append(step(patients, noise_multiplier))
    spread = torch.stack(draws).std(0).square().mean().sqrt() / noise_multiplier
    measured = float(spread)
    return Finding(Audit.SEEDS, "same seeds before each", 1.0, measured, measured >= 0.5)


def canary(step: Step, patients: Sequence[UnitData], *, noise_multiplier: float, runs: int) -> Finding:
    """How many standard deviations one patient's presence moves the release along its own direction.

    The step's Gaussian mu is 1 / noise multiplier at most (Dong et al. 2022, https://arxiv.org/abs/1905.02383).
    """
    *others, target = patients
    direction = step([target], 1e-6)
    direction = direction / direction.norm()
    inside = torch.stack([step(patients, noise_multiplier) @ direction for _ in range(runs)])
    outside = torch.stack([step(others, noise_multiplier) @ direction for _ in range(runs)])
    spread = torch.sqrt((inside.var() + outside.var()) / 2)
    measured = float((inside.mean() - outside.mean()) / spread.clamp(min=1e-12))
    expected = 1 / noise_multiplier
    margin = STANDARD_ERRORS * math.sqrt((2 + expected**2 / 2) / runs)
    return Finding(Audit.CANARY, "last patient in or out", expected, measured, measured <= expected + margin)


def _seed_everything(seed: int) -> None:
    from monai.utils.misc import set_determinism

    set_determinism(seed)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
