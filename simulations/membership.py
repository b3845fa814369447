"""Membership inference by likelihood ratio (LiRA, Carlini et al. 2022, https://arxiv.org/abs/2112.03570), in small.

Many models are trained, each on a random half of the same pictures. What the others show tells how confident a model
is about a picture that it has seen or not; the last model is attacked with that, in turn for every model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medfl.client.data.tensors import TensorSet
from medfl.client.training.plain import train_plain
from medfl.client.training.private import train_private
from medfl.shared.algorithms.travel import build_study_network
from medfl.shared.privacy.plan import TrainingPlan
from medfl.shared.privacy.settings import DpSgd
from medfl.shared.study import Study

FALSE_ALARMS = 0.01
_PIXELS = 16

Train = Callable[[nn.Module, TensorSet, int], None]
"""(network, training pictures, number of the model): train in place."""


@dataclass(frozen=True, slots=True)
class Membership:
    """How well members are told from others: 0.5 and 0.01 are guessing, 1 and 1 are certainty."""

    area: float  # under the ROC curve
    found: float  # share of members found when 1 % of the others are taken for members
    pictures: int
    models: int


def attack_membership(train: Train, *, pictures: int = 200, models: int = 16, seed: int = 0) -> Membership:
    """Train ``models`` with ``train`` on halves of ``pictures`` hard-to-learn pictures, and attack each."""
    pool, draw = made_up_pictures(pictures, seed), np.random.default_rng(seed)
    inside = np.zeros((models, pictures), bool)
    for column in range(pictures):  # each picture is in half of the models
        inside[draw.permutation(models)[: models // 2], column] = True
    confidence = np.empty((models, pictures))
    for model in range(models):
        network = build_study_network(memorising_study())
        rows = torch.from_numpy(np.flatnonzero(inside[model]))
        train(network, TensorSet(pool.images[rows], pool.labels[rows], pool.patients[rows]), model)
        confidence[model] = _margins(network.eval(), pool)
    ratios = _likelihood_ratios(confidence, inside)
    return Membership(*_curve(ratios[inside], ratios[~inside]), pictures, models)


def unprotected(network: nn.Module, data: TensorSet, model: int) -> None:
    """The product's plain training, long enough to memorise."""
    train_plain(network, data, memorising_study(), generator=torch.Generator().manual_seed(model))


def protected(settings: DpSgd, plan: TrainingPlan) -> Train:
    """The product's private training by ``plan``."""

    def train(network: nn.Module, data: TensorSet, model: int) -> None:
        train_private(network, data, memorising_study(), settings, plan)

    return train


def memorising_study() -> Study:
    """Logistic regression with more weights than pictures: it can learn every picture by heart."""
    return Study.model_validate(
        {
            "name": "membership",
            "task": "classification",
            "data": {
                "modality": "photo",
                "dimensions": 2,
                "classes": ["no", "yes"],
                "preprocessing": {"normalise": "scale_255", "size": [_PIXELS, _PIXELS]},
            },
            "model": {"name": "logistic", "inputs": _PIXELS**2},
            "training": {"loss": "cross-entropy", "optimizer": "sgd", "learning_rate": 0.2, "steps": 60},
            "rounds": {"count": 1},
            "privacy": {"mode": "none"},
            "secure_aggregation": {"mode": "none"},
        }
    )


def made_up_pictures(count: int, seed: int) -> TensorSet:
    """Noise with a faint class in it, one picture a patient: to fit its label, a picture must be learnt by heart."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=draw)
    images = torch.randn((count, 1, _PIXELS, _PIXELS), generator=draw) + 0.05 * (2 * labels - 1)[:, None, None, None]
    return TensorSet(images, labels, torch.arange(count))


def _margins(network: nn.Module, pool: TensorSet) -> NDArray[np.float64]:
    """The label's logit minus the other's: the logit of the confidence, which is near Gaussian over models."""
    with torch.no_grad():
        logits: Tensor = network(pool.images)
    margins: NDArray[np.float64] = ((logits[:, 1] - logits[:, 0]) * (2 * pool.labels - 1)).double().numpy()
    return margins


def _likelihood_ratios(confidence: NDArray[np.float64], inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Log ratios (models, pictures), each from all other models; one variance for all, because the models are few."""
    models = len(confidence)
    ratios = np.empty_like(confidence)
    for model in range(models):
        others = np.arange(models) != model
        seen, known = inside[others], confidence[others]
        mean_in = np.where(seen, known, 0).sum(0) / np.maximum(seen.sum(0), 1)
        mean_out = np.where(seen, 0, known).sum(0) / np.maximum((~seen).sum(0), 1)
        variance = max(float(np.square(known - np.where(seen, mean_in, mean_out)).mean()), 1e-12)
        ratios[model] = (np.square(confidence[model] - mean_out) - np.square(confidence[model] - mean_in)) / variance
    return ratios


def _curve(members: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[float, float]:
    """Area under the ROC curve, and the share of members above all but 1 % of the others."""
    order = np.sort(others)
    below = np.searchsorted(order, members, "left") + np.searchsorted(order, members, "right")
    threshold = order[int(np.ceil((1 - FALSE_ALARMS) * len(order))) - 1]
    return float(below.mean() / (2 * len(order))), float((members > threshold).mean())
