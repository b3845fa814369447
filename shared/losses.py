"""The losses a study may name, as functions of network output and labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.losses.dice import DiceCELoss
from torch.nn import functional

from medfl.shared.study import Loss

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits (N, K, *spatial), labels) -> scalar mean over the batch. Each example's part depends on that example only."""


def build_loss(loss: Loss) -> LossFunction:
    """The function for a study's ``training.loss``.

    Labels: class indices (N, *spatial) for dice-ce, (N,) for cross-entropy, 0/1 (N, K) for binary-cross-entropy.
    """
    match loss:
        case Loss.DICE_CE:
            # batch=False (MONAI's default): Dice of each image, then the mean, so that no image's loss sees another's.
            dice_ce = DiceCELoss(to_onehot_y=True, softmax=True)
            return lambda logits, labels: dice_ce(logits, labels[:, None].long())
        case Loss.CROSS_ENTROPY:
            return lambda logits, labels: functional.cross_entropy(logits, labels.long())
        case Loss.BINARY_CROSS_ENTROPY:
            return lambda logits, labels: functional.binary_cross_entropy_with_logits(logits, labels.float())
