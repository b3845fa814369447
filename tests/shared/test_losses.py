from __future__ import annotations

import math

import pytest
import torch

from medfl.shared.losses import build_loss
from medfl.shared.study import Loss


def test_cross_entropy_of_even_odds_is_log_of_the_number_of_classes() -> None:
    assert float(build_loss(Loss.CROSS_ENTROPY)(torch.zeros(3, 4), torch.tensor([0, 1, 3]))) == pytest.approx(
        math.log(4)
    )


def test_binary_cross_entropy_of_even_odds_is_log_two() -> None:
    loss = build_loss(Loss.BINARY_CROSS_ENTROPY)(torch.zeros(2, 3), torch.tensor([[1, 0, 1], [0, 0, 0]]))
    assert float(loss) == pytest.approx(math.log(2))


def test_dice_with_cross_entropy_by_hand() -> None:
    # two classes, even odds at every pixel, mask on 1 of 4 pixels: cross-entropy log 2;
    # soft Dice of background 2*1.5/(2+3), of the mask 2*0.5/(2+1): Dice loss 1 - mean
    labels = torch.tensor([[[1, 0], [0, 0]]], dtype=torch.uint8)
    loss = float(build_loss(Loss.DICE_CE)(torch.zeros(1, 2, 2, 2), labels))
    assert loss == pytest.approx(math.log(2) + 1 - (3 / 5 + 1 / 3) / 2, abs=1e-4)


@pytest.mark.parametrize("which", list(Loss))
def test_the_loss_of_a_batch_is_the_mean_over_its_examples(which: Loss) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn((3, 2, 4, 4) if which is Loss.DICE_CE else (3, 2), generator=draw)
    labels = {
        Loss.DICE_CE: (logits[:, 0] > 0).to(torch.uint8),
        Loss.CROSS_ENTROPY: torch.tensor([0, 1, 1]),
        Loss.BINARY_CROSS_ENTROPY: (logits > 0.3).float(),
    }[which]
    loss_of = build_loss(which)
    each = [float(loss_of(logits[row : row + 1], labels[row : row + 1])) for row in range(3)]
    assert float(loss_of(logits, labels)) == pytest.approx(sum(each) / 3, rel=1e-5)
    assert loss_of.each(logits, labels).tolist() == pytest.approx(each, rel=1e-6)


@pytest.mark.parametrize("which", list(Loss))
def test_the_loss_of_one_example_has_no_gradient_in_another(which: Loss) -> None:
    logits = torch.randn((3, 2, 4, 4) if which is Loss.DICE_CE else (3, 2)).requires_grad_()
    labels = torch.ones(3, 4, 4) if which is Loss.DICE_CE else torch.ones((3, 2) if "binary" in which else 3)
    for row, value in enumerate(build_loss(which).each(logits, labels)):
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        moved = gradient.flatten(1).abs().sum(1) > 0
        assert moved.tolist() == [other == row for other in range(3)]
