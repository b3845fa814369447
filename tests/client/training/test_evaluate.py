from __future__ import annotations

import pytest
import torch
from tiny import classes_study, labels_study, masks_study
from torch import nn

from medfl.client.data.tensors import TensorSet
from medfl.client.training.evaluate import evaluate
from medfl.shared.metrics import read, tally_names


class Says(nn.Module):
    """Gives the prepared logits, batch after batch."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.at = logits, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.at += len(images)
        return self.logits[self.at - len(images) : self.at]


def pictures(count: int, size: tuple[int, int] = (4, 4)) -> torch.Tensor:
    return torch.zeros(count, 1, *size)


def test_a_confusion_matrix_by_hand() -> None:
    study = classes_study(training={"batch_size": 2})
    data = TensorSet(pictures(5), torch.tensor([0, 0, 0, 1, 1]), torch.arange(5))
    logits = torch.tensor([[9.0, 0], [9, 0], [0, 9], [0, 9], [9, 0]])
    tally = evaluate(Says(logits), data, study)
    assert tuple(tally) == tally_names(study.scoring, study.data.classes)
    counts = {name: value for name, value in tally.items() if name.startswith("confusion")}
    assert counts == {"confusion/no/no": 2, "confusion/no/yes": 1, "confusion/yes/no": 1, "confusion/yes/yes": 1}
    assert tally["examples"] == 5
    assert tally["loss"] == pytest.approx(2 * 9, abs=0.01)  # two wrong ones of about 9 each


def test_labels_by_hand() -> None:
    study = labels_study()
    data = TensorSet(pictures(4), torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), torch.arange(4))
    logits = torch.tensor([[9.0, -9], [-9, -9], [-9, 9], [9, 9]])
    tally = evaluate(Says(logits), data, study)
    assert [tally[f"{what}/round"] for what in ("tp", "fn", "fp", "tn")] == [1, 1, 1, 1]
    assert [tally[f"{what}/bright"] for what in ("tp", "fn", "fp", "tn")] == [2, 0, 0, 2]
    assert read(tally)["balanced_accuracy"] == 0.75


def test_dice_is_counted_by_patient_over_all_the_patients_slices() -> None:
    study = masks_study(training={"batch_size": 1})
    truth = torch.zeros(3, 8, 8, dtype=torch.uint8)
    truth[0, 0, :4] = 1  # patient 5: slice 0 has 4 pixels, slice 1 none; patient 7: none at all
    predicted = torch.zeros(3, 8, 8)
    predicted[0, 0, :2] = 1  # 2 of the 4
    predicted[1, 0, :2] = 1  # 2 that are not there
    logits = torch.stack([1 - predicted, predicted], 1) * 20
    tally = evaluate(Says(logits), TensorSet(pictures(3, (8, 8)), truth, torch.tensor([5, 5, 7])), study)
    assert tally["patients/spot"] == 1  # patient 7 has nothing to score
    assert tally["dice/spot"] == pytest.approx(2 * 2 / (4 + 4))


def test_scoring_is_the_same_whatever_the_batch() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 2, (5, 8, 8), generator=draw).to(torch.uint8)
    data = TensorSet(pictures(5, (8, 8)), truth, torch.tensor([0, 0, 1, 1, 1]))
    logits = torch.randn(5, 2, 8, 8, generator=draw)
    tallies = [evaluate(Says(logits), data, masks_study(training={"batch_size": size})) for size in (1, 2, 5)]
    assert tallies[0] == pytest.approx(tallies[1])
    assert tallies[0] == pytest.approx(tallies[2])
