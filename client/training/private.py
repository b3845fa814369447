"""One round of DP-SGD: units drawn independently, each gradient clipped once, noise, the ordinary optimizer."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from medfl.client.data.augment import augmenter
from medfl.client.data.batches import Augment
from medfl.client.data.tensors import TensorSet
from medfl.client.privacy.clipped import UnitData
from medfl.client.privacy.patient_gradient import StepFacts, private_gradients, sample_patients
from medfl.client.privacy.randomness import SecureGenerator
from medfl.client.privacy.refusals import require_private_network, require_separable_loss
from medfl.client.training.optimizers import build_optimizer
from medfl.client.training.plain import gradient_rule
from medfl.shared.errors import DataError
from medfl.shared.losses import build_loss
from medfl.shared.privacy.plan import TrainingPlan
from medfl.shared.privacy.settings import DpSgd, Unit
from medfl.shared.study import Study

log = logging.getLogger("medfl.site")


def train_private(
    network: nn.Module,
    data: TensorSet,
    study: Study,
    settings: DpSgd,
    plan: TrainingPlan,
    *,
    round_number: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train ``network`` in place for the plan's steps of one round.

    Sampling, slices and noise come from a fresh generator keyed by the operating system: no seed of the study, of
    PyTorch or of MONAI reaches them. The strategy's own term is added after the noise (it depends on no image).
    """
    secure = SecureGenerator()
    draws = torch.Generator(data.labels.device).manual_seed(secrets.randbits(63))  # augmentation only
    loss, augment = build_loss(study.training.loss), augmenter(study.data.augmentation)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(study, parameters, round_number)
    adjust = gradient_rule(study, parameters)
    units = rows_of_units(data, plan.unit)
    network.train()
    facts = []
    for step in range(plan.steps_per_round):
        drawn = [
            _unit(data, units[index], settings, secure, augment, draws)
            for index in sample_patients(len(units), plan.sampling_rate, secure)
        ]
        optimizer.zero_grad()
        done = private_gradients(
            network,
            loss,
            drawn,
            clip_norm=plan.clip_norm,
            noise_multiplier=plan.noise_multiplier,
            expected_patients=plan.expected_batch,
            generator=secure,
            engine=settings.engine,
        )
        facts.append(done)
        adjust()
        optimizer.step()
        if progress is not None:
            progress(step + 1, plan.steps_per_round)
    _tell(facts, round_number)


def _tell(facts: Sequence[StepFacts], round_number: int) -> None:
    """For the site's own log: whether the clip fits, and whether gradients were lost."""
    drawn = sum(step.drawn for step in facts)
    dropped, clipped = torch.stack([torch.stack([step.dropped, step.clipped]) for step in facts]).sum(0).tolist()
    log.info("round %d: %d gradients, %d of them longer than the clip", round_number, drawn, clipped)
    if dropped:
        log.warning(
            "round %d: %d of %d gradients were not finite and were left out: lower training.learning_rate, or look at "
            "the intensities",
            round_number,
            dropped,
            drawn,
        )


def require_private_training(network: nn.Module, data: TensorSet, study: Study, settings: DpSgd) -> None:
    """Return when ``network`` and the study's loss can be trained with per-unit gradients. Looks at no image's values.

    Raises:
        ConfigError: one line for each problem.
    """
    two = torch.zeros(2, dtype=torch.int64, device=data.labels.device)
    require_private_network(network, torch.randn_like(data.inputs(two)), engine=settings.engine)
    labels = torch.zeros_like(data.labels[two])
    labels[1] = 1  # one row of each of two classes
    space = () if study.data.multi_label else labels.shape[1:]
    outputs = torch.randn(2, len(study.data.classes), *space, device=labels.device)
    require_separable_loss(build_loss(study.training.loss), outputs, labels)


def rows_of_units(data: TensorSet, unit: Unit) -> list[Tensor]:
    """Row numbers (int64) of each patient's, or of each single, image."""
    if unit is Unit.IMAGE:
        return list(torch.split(data.rows, 1))
    return [torch.nonzero(data.patients == patient).flatten() for patient in torch.unique(data.patients)]


def _unit(
    data: TensorSet,
    rows: Tensor,
    settings: DpSgd,
    secure: SecureGenerator,
    augment: Augment | None,
    draws: torch.Generator,
) -> UnitData:
    """All a unit contributes to this step: its slices (drawn where there are more than asked), augmented K times."""
    if settings.unit is Unit.PATIENT and settings.slices_per_patient is not None:
        chosen = secure.choose(len(rows), settings.slices_per_patient)
        rows = rows[torch.from_numpy(chosen).to(rows.device)]
    rows = rows.repeat(settings.augmentations)
    images, labels = data.inputs(rows), data.labels.index_select(0, rows)
    return augment(images, labels, draws) if augment else (images, labels)


def planned_units(data: TensorSet, settings: DpSgd) -> tuple[int, int]:
    """Number of units and of patients the accountant plans with."""
    return len(rows_of_units(data, settings.unit)), int(torch.unique(data.patients).numel())


def require_promised_images(data: TensorSet, settings: DpSgd) -> None:
    """Return when no patient has more images than ``unit: image`` was promised: the patient's epsilon rests on it.

    Raises:
        DataError: with counts only.
    """
    if settings.unit is not Unit.IMAGE or settings.images_per_patient is None:
        return
    images = torch.unique(data.patients, return_counts=True)[1]
    above = int((images > settings.images_per_patient).sum())
    if above:
        raise DataError(
            f"{above} of {len(images)} patients have more than privacy.images_per_patient, which is "
            f"{settings.images_per_patient} (the most here is {int(images.max())}): their epsilon would be larger than "
            "what is charged. Leave out images of these patients, or ask for a study with unit: patient"
        )
