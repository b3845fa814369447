"""The losses a study may name, as functions of network output and labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from monai.losses.dice import DiceCELoss, DiceLoss
from torch import Tensor
from torch.nn import functional

from medfl.shared.study import Loss

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, K, *spatial), labels) -> scalar mean over the batch. Each example's part depends on that example only."""


@dataclass(frozen=True, slots=True)
class StudyLoss:
    """A loss as the mean over a batch, and as one value for each example: equal, and tested to be."""

    mean: LossFunction
    each: LossFunction
    """(logits (N, K, *spatial), labels) -> (N,)"""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean, a scalar."""
        return self.mean(logits, labels)


@cache
def build_loss(loss: Loss) -> StudyLoss:
    """The function for a study's ``training.loss``.

    Labels: class indices (N, *spatial) for dice-ce, (N,) for cross-entropy, 0/1 (N, K) for binary-cross-entropy.
    """
    match loss:
        case Loss.DICE_CE:
            # batch=False (MONAI's default): Dice of each image, then the mean, so that no image's loss sees another's.
            mean = DiceCELoss(to_onehot_y=True, softmax=True)
            dice = DiceLoss(to_onehot_y=True, softmax=True, reduction="none")
            return StudyLoss(
                lambda logits, labels: mean(logits, labels[:, None].long()),
                lambda logits, labels: (
                    _of_each(dice(logits, labels[:, None].long()))
                    + _of_each(functional.cross_entropy(logits, labels.long(), reduction="none"))
                ),
            )
        case Loss.CROSS_ENTROPY:
            return StudyLoss(
                lambda logits, labels: functional.cross_entropy(logits, labels.long()),
                lambda logits, labels: functional.cross_entropy(logits, labels.long(), reduction="none"),
            )
        case Loss.BINARY_CROSS_ENTROPY:
            loss_of = functional.binary_cross_entropy_with_logits
            return StudyLoss(
                lambda logits, labels: loss_of(logits, labels.float()),
                lambda logits, labels: _of_each(loss_of(logits, labels.float(), reduction="none")),
            )


def _of_each(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
