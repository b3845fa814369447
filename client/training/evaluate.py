"""Scores of a model on a site's own patients, as sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from medfl.client.data.batches import in_order
from medfl.client.data.tensors import TensorSet
from medfl.client.trouble import free_memory, out_of_memory
from medfl.shared.losses import build_loss
from medfl.shared.metrics import EXAMPLES, LOSS, Scoring, patient_dice, tally_names
from medfl.shared.study import Study


@torch.no_grad()
def evaluate(network: nn.Module, data: TensorSet, study: Study) -> dict[str, float]:
    """Tally of ``network`` over ``data``, names as in :func:`medfl.shared.metrics.tally_names`.

    Segmentation is scored by patient (all slices together), classification by image. Not augmented, deterministic.
    """
    network.eval()
    scores, loss = _outputs(network, data, study, study.training.batch_size)
    tally = dict.fromkeys(tally_names(study.scoring, study.data.classes), 0.0)
    tally |= {LOSS: loss, EXAMPLES: float(len(data.labels))}
    match study.scoring:
        case Scoring.DICE:
            _add_dice(tally, scores.argmax(1), data, study.data.classes)
        case Scoring.CONFUSION:
            _add_confusion(tally, scores.argmax(1), data, study.data.classes)
        case Scoring.PER_LABEL:
            _add_labels(tally, scores > 0, data, study.data.classes)
    return tally


def _outputs(network: nn.Module, data: TensorSet, study: Study, at_once: int) -> tuple[torch.Tensor, float]:
    """Logits of all images, and the sum of their losses; half as many images ``at_once`` when memory runs out."""
    loss_of, logits, loss = build_loss(study.training.loss), [], 0.0
    try:
        for images, labels, _ in in_order(data, at_once):
            logits.append(network(images))
            loss += float(loss_of(logits[-1], labels)) * len(labels)
        return torch.cat(logits), loss
    except (RuntimeError, MemoryError) as error:
        if at_once == 1 or not out_of_memory(error):
            raise
    logits.clear()
    free_memory()
    return _outputs(network, data, study, at_once // 2)


def _add_dice(tally: dict[str, float], predicted: torch.Tensor, data: TensorSet, classes: Sequence[str]) -> None:
    for patient in torch.unique(data.patients):
        chosen = data.patients == patient
        scores = patient_dice(predicted[chosen], data.labels[chosen], len(classes))
        for name, score in zip(classes[1:], scores.tolist(), strict=True):
            if not math.isnan(score):  # the class is in neither the truth nor the prediction
                tally[f"dice/{name}"] += score
                tally[f"patients/{name}"] += 1


def _add_confusion(tally: dict[str, float], predicted: torch.Tensor, data: TensorSet, classes: Sequence[str]) -> None:
    for true, guess in zip(data.labels.tolist(), predicted.tolist(), strict=True):
        tally[f"confusion/{classes[true]}/{classes[guess]}"] += 1


def _add_labels(tally: dict[str, float], predicted: torch.Tensor, data: TensorSet, classes: Sequence[str]) -> None:
    truth = data.labels.bool()
    counts = {"tp": truth & predicted, "fn": truth & ~predicted, "fp": ~truth & predicted, "tn": ~truth & ~predicted}
    for what, which in counts.items():
        for name, count in zip(classes, which.sum(0).tolist(), strict=True):
            tally[f"{what}/{name}"] += count
