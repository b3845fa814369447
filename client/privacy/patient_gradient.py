"""One private gradient: sample, clip each patient once, add noise, divide by the expected number of patients.

Clip and noise stay in one file so that neither can be had without the other. Everything after it (momentum, Adam,
proximal terms, averaging) is post-processing and costs no privacy. Source: Abadi et al. 2016,
https://arxiv.org/abs/1607.00133; patients as the unit: McMahan et al. 2018, https://arxiv.org/abs/1710.06963.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medfl.client.privacy.bookkeeping.engine import clipped_sum_by_bookkeeping
from medfl.client.privacy.clipped import ClippedSum, LossFunction, UnitData, clipped_sum_by_loop, trainable, views_of
from medfl.client.privacy.opacus_engine import clipped_sum_by_opacus
from medfl.client.privacy.randomness import NoiseSource, noisy
from medfl.client.trouble import free_memory, out_of_memory
from medfl.shared.errors import ConfigError
from medfl.shared.privacy.settings import Engine

log = logging.getLogger("medfl.site")

# A pass keeps one gradient of each unit in part. More units than have so many values together go through the network in
# several passes, so memory does not grow with the batch; a second pass made ResNet18 no slower, DenseNet121 by 10 %.
_VALUES_AT_ONCE = 300_000_000

# Patients with so many images, or fewer, go through the network together, so many images at a time: passes of four
# images cost a tenth more than one of all, passes of eight half of that.
_FEW_ROWS, _ROWS_AT_ONCE = 8, 16


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What happened in one step. Exact counts of patients are no part of the guarantee: they never leave the site.

    Those on the device are for the end of a round: to look at one waits for the device.
    """

    drawn: int
    dropped: torch.Tensor  # () int64: gradients that were not finite
    clipped: torch.Tensor  # () int64


def sample_patients(patients: int, sampling_rate: float, generator: NoiseSource) -> NDArray[np.int64]:
    """Indices of this step's patients: each independently with probability ``sampling_rate`` (may be none)."""
    return np.flatnonzero(generator.bernoulli(patients, sampling_rate))


def private_gradients(
    network: nn.Module,
    loss: LossFunction,
    patients: Sequence[UnitData],
    *,
    clip_norm: float,
    noise_multiplier: float,
    expected_patients: float,
    generator: NoiseSource,
    engine: Engine = Engine.BOOKKEEPING,
) -> StepFacts:
    """Write one DP-SGD gradient into ``p.grad`` of every trainable parameter of ``network``.

    Args:
        network: without BatchNorm (see :mod:`medfl.client.privacy.refusals`), in training mode.
        loss: mean over the rows of one patient. It is called for each patient apart, so it may couple a
            patient's own slices (Dice over the volume) and never couples patients.
        patients: what :func:`sample_patients` drew, each with all rows it contributes: slices, patches,
            augmentations. May be empty: pure noise is then released, and the step counts like any other.
        clip_norm: largest l2 norm of one patient's gradient, over all parameters together.
        noise_multiplier: standard deviation of the noise on the sum, in clip norms.
        expected_patients: sampling rate times patients, as planned: dividing by the number drawn would tell it.
        generator: the site's :class:`~medfl.client.privacy.randomness.SecureGenerator`.
        engine: used for patients of one row, and ``bookkeeping`` also for those of a few, shape by shape; others are
            taken one by one.

    Raises:
        ConfigError: a setting is out of range, or the engine has no rule for a layer. ``p.grad`` is then unchanged.
    """
    for name, value in (
        ("clip_norm", clip_norm),
        ("noise_multiplier", noise_multiplier),
        ("expected_patients", expected_patients),
    ):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} must be positive and finite, got {value}: set it under privacy:")
    clipped = clipped_sum(network, loss, patients, clip_norm, engine)
    scale = noise_multiplier * clip_norm
    # All values in one call: one call for each of many small parameters takes twice as long.
    released = noisy(clipped.flat, scale, generator, divisor=expected_patients, in_place=True)
    for parameter, part in zip(clipped.parameters, views_of(released, clipped.parameters), strict=True):
        parameter.grad = part.to(parameter.dtype)
    finite = clipped.norms.isfinite()
    return StepFacts(len(patients), (~finite).sum(), (finite & (clipped.norms > clip_norm)).sum())


def clipped_sum(
    network: nn.Module, loss: LossFunction, patients: Sequence[UnitData], clip_norm: float, engine: Engine
) -> ClippedSum:
    """Sum of the patients' clipped gradients, by the fastest way the engine, the patients' shapes and memory allow."""
    alike: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for number, (images, labels) in enumerate(patients):
        alike.setdefault((images.shape, labels.shape), []).append(number)
    if not patients:
        return clipped_sum_by_loop(network, loss, patients, clip_norm)
    parts: list[ClippedSum] = []
    for numbers in alike.values():
        parts += _sums_of_alike(network, loss, [patients[number] for number in numbers], clip_norm, engine)
    return _added(parts, order=[number for numbers in alike.values() for number in numbers])


def _sums_of_alike(
    network: nn.Module, loss: LossFunction, patients: Sequence[UnitData], clip_norm: float, engine: Engine
) -> list[ClippedSum]:
    """The clipped sums of groups of patients whose images and labels have the same shapes."""
    rows = len(patients[0][0])
    if engine is not Engine.LOOP and (rows == 1 or (engine is Engine.BOOKKEEPING and _gains(rows, len(patients)))):
        together = clipped_sum_by_bookkeeping if engine is Engine.BOOKKEEPING else clipped_sum_by_opacus
        most = units_at_once(network) if rows == 1 else min(units_at_once(network), _ROWS_AT_ONCE // rows)
        full = False
        try:
            return [together(network, loss, group, clip_norm) for group in _groups(patients, most)]
        except ConfigError:
            if rows == 1:
                raise
        except (RuntimeError, MemoryError) as error:
            if not (full := out_of_memory(error)):
                raise
        if full:  # not above: the exception holds the tensors of the failed attempt
            free_memory()
            log.warning("memory ran out: the step's patients are taken one after the other")
    return [clipped_sum_by_loop(network, loss, patients, clip_norm)]


def _gains(rows: int, patients: int) -> bool:
    """Whether ``patients`` of several ``rows`` each are faster together than in a pass of their own."""
    return patients > 1 and rows <= _FEW_ROWS


def units_at_once(network: nn.Module) -> int:
    """How many units go through ``network`` in one pass: their gradients would fit into 1.2 GB as float32."""
    return max(1, _VALUES_AT_ONCE // max(1, sum(parameter.numel() for parameter in trainable(network))))


def _groups(units: Sequence[UnitData], most: int) -> list[Sequence[UnitData]]:
    """As few as hold at most ``most`` each, of nearly equal size."""
    size = math.ceil(len(units) / math.ceil(len(units) / most))
    return [units[start : start + size] for start in range(0, len(units), size)]


def _added(parts: Sequence[ClippedSum], *, order: Sequence[int]) -> ClippedSum:
    """The clipped sum over the units of all ``parts``, which are those with these numbers."""
    first, *others = parts
    for other in others:
        first.flat.add_(other.flat)
    norms = torch.cat([part.norms for part in parts])
    return ClippedSum(first.flat, first.parameters, norms[torch.tensor(order, device=norms.device).argsort()])
