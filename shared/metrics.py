"""Scores as sums that add up over sites, and the means one reads from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from medfl.shared.errors import ProtocolError

if TYPE_CHECKING:
    import torch

LOSS, EXAMPLES = "loss", "examples"

Tally = Mapping[str, float]
"""Sums over examples or patients (never means), so that tallies of several sites add up."""


class Scoring(StrEnum):
    """What is counted: Dice by patient, a confusion matrix, or yes and no for each of several labels."""

    DICE = "dice"
    CONFUSION = "confusion"
    PER_LABEL = "per-label"


def tally_names(scoring: Scoring, classes: Sequence[str]) -> tuple[str, ...]:
    """Names of all sums a site reports for one evaluation, in their public order.

    Dice: its sum over patients and the number of such patients for each foreground class (the first class is
    background). Confusion: the matrix row by row (true class, predicted class). Per label: true positives, false
    negatives, false positives, true negatives of each class.
    """
    match scoring:
        case Scoring.DICE:
            scores = [f"{what}/{name}" for name in classes[1:] for what in ("dice", "patients")]
        case Scoring.CONFUSION:
            scores = [f"confusion/{true}/{predicted}" for true in classes for predicted in classes]
        case Scoring.PER_LABEL:
            scores = [f"{what}/{name}" for name in classes for what in ("tp", "fn", "fp", "tn")]
    return (LOSS, EXAMPLES, *scores)


def check_names(tally: Mapping[str, float], names: Sequence[str]) -> None:
    """Raise ProtocolError unless ``tally`` is empty or holds exactly the sums that ``names`` says."""
    if tally and set(tally) != set(names):
        raise ProtocolError("a tally must hold the sums of this study, all of them and no other")


def add(tallies: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sum of tallies, name by name."""
    total: dict[str, float] = {}
    for tally in tallies:
        for name, value in tally.items():
            total[name] = total.get(name, 0.0) + value
    return total


def patient_dice(predicted: torch.Tensor, truth: torch.Tensor, classes: int) -> torch.Tensor:
    """Dice of one patient for each foreground class, over all the patient's slices or volumes together.

    Args:
        predicted: class indices, integer, (slices, *spatial).
        truth: class indices, same shape.
        classes: number of classes including background 0.

    Returns:
        float32 (classes - 1,); NaN where the class is in neither (no score), 0 where it is predicted only.
    """
    from monai.metrics.meandice import compute_dice
    from monai.networks.utils import one_hot

    def stacked(labels: torch.Tensor) -> torch.Tensor:  # (1, classes, slices, *spatial)
        return one_hot(labels[None, None].long(), num_classes=classes)

    dice = compute_dice(stacked(predicted), stacked(truth), include_background=False, ignore_empty=False)[0]
    absent = stacked(truth)[0, 1:].flatten(1).sum(1) + stacked(predicted)[0, 1:].flatten(1).sum(1) == 0
    result: torch.Tensor = dice.masked_fill(absent, float("nan"))
    return result


def read(tally: Mapping[str, float]) -> dict[str, float]:
    """The scores a person reads: mean loss, mean Dice (per class and over classes), accuracy, balanced accuracy.

    >>> read({"loss": 4.0, "examples": 8.0, "dice/lung": 1.5, "patients/lung": 2.0})
    {'loss': 0.5, 'dice/lung': 0.75, 'dice': 0.75}
    """
    scores: dict[str, float] = {}
    if tally.get(EXAMPLES):
        scores["loss"] = tally[LOSS] / tally[EXAMPLES]
    if tally.keys() <= {LOSS, EXAMPLES}:  # of a training
        return scores
    dice = {
        name: value / tally["patients/" + name.removeprefix("dice/")]
        for name, value in tally.items()
        if name.startswith("dice/") and tally.get("patients/" + name.removeprefix("dice/"))
    }
    scores |= dice
    if dice:
        scores["dice"] = sum(dice.values()) / len(dice)
    confusion = {tuple(name.split("/")[1:]): n for name, n in tally.items() if name.startswith("confusion/")}
    if total := sum(confusion.values()):
        scores["accuracy"] = sum(n for (true, predicted), n in confusion.items() if true == predicted) / total
        rows = {true: sum(n for (t, _), n in confusion.items() if t == true) for true, _ in confusion}
        recalls = [confusion[true, true] / n for true, n in rows.items() if n]
        scores["balanced_accuracy"] = sum(recalls) / len(recalls)
    scores |= _per_label(tally)
    return scores


def _per_label(tally: Mapping[str, float]) -> dict[str, float]:
    """Balanced accuracy of each label that occurs both ways, and their mean."""
    scores: dict[str, float] = {}
    for label in [name.removeprefix("tp/") for name in tally if name.startswith("tp/")]:
        tp, fn, fp, tn = (tally[f"{what}/{label}"] for what in ("tp", "fn", "fp", "tn"))
        if tp + fn and fp + tn:
            scores[f"balanced_accuracy/{label}"] = (tp / (tp + fn) + tn / (fp + tn)) / 2
    if scores:
        scores["balanced_accuracy"] = sum(scores.values()) / len(scores)
    return scores


def headline(scores: Mapping[str, float]) -> tuple[str, float] | None:
    """The one score that stands for a model in tables: Dice, else balanced accuracy, else nothing."""
    for name in ("dice", "balanced_accuracy"):
        if name in scores:
            return name, scores[name]
    return None
