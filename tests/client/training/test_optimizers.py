from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny import classes_study
from torch import nn

from medfl.client.training.optimizers import build_optimizer

CLASSES = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "sgd": (torch.optim.SGD, {}),
    "sgd with momentum": (torch.optim.SGD, {"momentum": 0.5}),
}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (7,), (2, 2, 2))]


@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize("weight_decay", [0.0, 0.125])
def test_each_step_has_the_bits_of_pytorchs_class(name: str, weight_decay: float) -> None:
    kind, more = CLASSES[name]
    settings: dict[str, Any] = {
        "optimizer": name.split(maxsplit=1)[0], "learning_rate": 0.25, "weight_decay": weight_decay, **more
    }  # fmt: skip
    ours, theirs = parameters(), parameters()
    made = build_optimizer(classes_study(training=settings), ours, 1)
    reference = kind(theirs, lr=0.25, weight_decay=weight_decay, **more)
    generator = torch.Generator().manual_seed(2)
    for step in range(5):
        made.zero_grad()
        reference.zero_grad()
        for place, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if place != 1 or step in (1, 3):  # the second has no gradient in most steps: its state stands still
                mine.grad = torch.randn(mine.shape, generator=generator)
                other.grad = mine.grad.clone()
        made.step()
        reference.step()
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_the_learning_rate_is_the_rounds() -> None:
    (weight,) = [nn.Parameter(torch.zeros(1))]
    settings = {"optimizer": "sgd", "learning_rate": 1.0, "decay": "cosine"}
    made = build_optimizer(classes_study(training=settings, rounds={"count": 4}), [weight], 3)
    weight.grad = torch.ones(1)
    made.step()
    assert weight.item() == pytest.approx(-0.5)  # half way down the cosine


def test_training_does_not_import_the_compiler() -> None:
    code = """
import sys, torch
from tiny import classes_study, site_data
from medfl.client.data.splits import Split
from medfl.client.training.plain import train_plain
from medfl.shared.algorithms.travel import build_study_network
study = classes_study()
data = site_data(study).splits[Split.TRAIN]
train_plain(build_study_network(study), data, study, generator=torch.Generator())
assert "torch._dynamo" not in sys.modules
"""
    where = [path for path in sys.path if path.endswith("support")]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path += {where!r}\n{code}"], check=True)
