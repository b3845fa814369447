"""What a site fixes before its first private step: sampling rate, noise, steps; and what it should know beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from medfl.shared.errors import ConfigError
from medfl.shared.privacy.accounting import SampledGaussian, check_delta, epsilon, solve_noise_multiplier
from medfl.shared.privacy.adaptive_clip import noise_for_both
from medfl.shared.privacy.settings import ClientLevel, DpSgd, Unit

FEW_PATIENTS = 100


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Fixed for a study at a site. Patients who leave later change how many can be drawn, never ``sampling_rate``."""

    unit: Unit
    epsilon: float  # the study's promise for one unit
    delta: float
    clip_norm: float
    noise_multiplier: float
    sampling_rate: float
    expected_batch: float  # units; divides the noisy sum, and does not follow the number actually drawn
    steps_per_round: int
    images_per_patient: int = 1

    @property
    def round_cost(self) -> SampledGaussian:
        """One round, as the accountant counts it."""
        return SampledGaussian(self.noise_multiplier, self.sampling_rate, self.steps_per_round, self.images_per_patient)


def plan_training(settings: DpSgd, *, units: int, patients: int, rounds: int) -> TrainingPlan:
    """The plan of a site with ``units`` patients or images (as ``settings.unit`` says), ``patients`` patients.

    Raises:
        ConfigError: delta above 1/patients, a site smaller than one step, or noise too small for epsilon.
    """
    check_delta(settings.delta, patients)
    if units < 1:
        raise ConfigError("a site needs at least one patient to plan private training")
    rate = settings.sampling_rate or min(1.0, settings.expected_batch / units)
    steps = settings.steps_per_round * rounds
    noise = settings.noise_multiplier
    if noise is None:
        noise = solve_noise_multiplier(settings.epsilon, settings.delta, sampling_rate=rate, steps=steps)
    else:
        cost = epsilon([SampledGaussian(noise, rate, steps)], settings.delta)
        if cost > settings.epsilon:
            raise ConfigError(
                f"privacy.noise_multiplier {noise:g} over {steps} steps at sampling rate {rate:.4g} costs epsilon "
                f"{cost:.3g}, above privacy.epsilon {settings.epsilon:g}: raise noise_multiplier or remove it, "
                "and it is solved"
            )
    return TrainingPlan(
        unit=settings.unit,
        epsilon=settings.epsilon,
        delta=settings.delta,
        clip_norm=settings.clip_norm,
        noise_multiplier=noise,
        sampling_rate=rate,
        expected_batch=min(settings.expected_batch, rate * units) if settings.sampling_rate is None else rate * units,
        steps_per_round=settings.steps_per_round,
        images_per_patient=settings.images_per_patient or 1,
    )


def plan_client_level(settings: ClientLevel, *, rounds: int, patients: int) -> TrainingPlan:
    """What a site charges its patients for rounds of client-level privacy: no sampling, so no amplification.

    With or without a site, the sum moves by one clip norm at most. With or without one of its patients, that site's
    update may turn around inside the clip: two clip norms. So a patient is charged half the noise multiplier. The same
    holds for the count of adaptive clipping, 1/2 and 1, so that its cost is in the one charge of the round.

    Raises:
        ConfigError: delta above 1/patients, or noise too small for the study's epsilon over ``rounds``.
    """
    check_delta(settings.delta, patients)
    noise = noise_for_both(settings)
    promised = epsilon([SampledGaussian(noise, 1.0, rounds)], settings.delta)
    if promised > settings.epsilon:
        with_count = "" if settings.adaptive_clip is None else f" ({noise:.3g} with the count of adaptive_clip)"
        raise ConfigError(
            f"privacy.noise_multiplier {settings.noise_multiplier:g}{with_count} over {rounds} rounds costs epsilon "
            f"{promised:.3g} for a site, above privacy.epsilon {settings.epsilon:g}: raise noise_multiplier or plan "
            "fewer rounds"
        )
    charged = SampledGaussian(noise / 2, 1.0, 1)
    return TrainingPlan(
        unit=Unit.PATIENT,
        epsilon=epsilon([charged.times(rounds)], settings.delta),
        delta=settings.delta,
        clip_norm=settings.clip_norm,
        noise_multiplier=charged.noise_multiplier,
        sampling_rate=1.0,
        expected_batch=1.0,
        steps_per_round=1,
    )


def warnings(settings: DpSgd, plan: TrainingPlan, *, patients: int, rounds: int) -> list[str]:
    """What the site's administrator should read before training, in words and numbers; often empty."""
    told = []
    if patients < FEW_PATIENTS:
        told.append(
            f"only {patients} patients: epsilon {settings.epsilon:g} needs noise multiplier {plan.noise_multiplier:g} "
            f"with {plan.expected_batch:g} units a step over {plan.steps_per_round * rounds} steps. Fewer rounds, "
            "a pretrained start and fewer trainable layers keep more of the accuracy"
        )
    if settings.unit is Unit.IMAGE:
        per_patient = epsilon([plan.round_cost.times(rounds)], settings.delta)
        told.append(
            f"epsilon {settings.epsilon:g} protects one image. A patient with {plan.images_per_patient} images has "
            f"epsilon {per_patient:.3g}: with unit: patient the stated figure would hold for patients"
        )
    return told
