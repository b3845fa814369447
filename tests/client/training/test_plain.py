from __future__ import annotations

import pytest
import torch
from tiny import classes_study, masks_study, site_data
from torch import nn

from medfl.client.data.splits import Split
from medfl.client.data.tensors import TensorSet
from medfl.client.training.plain import gradient_rule, planned_steps, train_plain
from medfl.shared.algorithms.travel import build_study_network
from medfl.shared.errors import TrainingError
from medfl.shared.study import Study


def trained(study: Study, data: TensorSet | None = None, *, seed: int = 0) -> tuple[nn.Module, dict[str, float]]:
    network = build_study_network(study)
    data = data or site_data(study).splits[Split.TRAIN]
    return network, train_plain(network, data, study, generator=torch.Generator().manual_seed(seed))


def values(network: nn.Module) -> torch.Tensor:
    return torch.cat([tensor.flatten().float() for tensor in network.state_dict().values()])


@pytest.mark.parametrize(
    ("training", "examples", "steps"),
    [
        ({"epochs": 1, "steps": None, "batch_size": 4}, 8, 2),
        ({"epochs": 1, "steps": None, "batch_size": 4}, 9, 3),
        ({"epochs": 3, "steps": None, "batch_size": 4}, 3, 3),
        ({"steps": 7, "batch_size": 4}, 1000, 7),
        ({"steps": 7, "batch_size": 4}, 1, 7),
    ],
)
def test_steps_of_a_round(training: dict[str, int | None], examples: int, steps: int) -> None:
    assert planned_steps(classes_study(training=training).training, examples) == steps


def test_an_epoch_sees_every_image_once_and_progress_is_told_by_step() -> None:
    study = classes_study(training={"epochs": 2, "steps": None, "batch_size": 3})
    told: list[tuple[int, int]] = []
    data = site_data(study).splits[Split.TRAIN]
    tally = train_plain(
        build_study_network(study), data, study, generator=torch.Generator(), progress=lambda *at: told.append(at)
    )
    assert tally["examples"] == 2 * len(data)
    assert told == [(step, 6) for step in range(1, 7)]


def test_the_loss_is_a_sum_over_examples() -> None:
    study = classes_study(training={"steps": 1, "learning_rate": 1e-6})
    network = build_study_network(study)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    data = site_data(study).splits[Split.TRAIN]
    tally = train_plain(network, data, study, generator=torch.Generator())
    assert tally["loss"] == pytest.approx(len(data) * torch.log(torch.tensor(2.0)).item())


def test_one_step_of_sgd_is_minus_rate_times_gradient() -> None:
    study = classes_study(training={"steps": 1})
    data = site_data(study).splits[Split.TRAIN]
    network = build_study_network(study)
    before = [p.detach().clone() for p in network.parameters()]
    loss = nn.functional.cross_entropy(network(data.images), data.labels)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    after, _ = trained(study)
    for start, gradient, end in zip(before, gradients, after.parameters(), strict=True):
        assert torch.allclose(end, start - 0.5 * gradient, atol=1e-6)


def test_the_same_generator_gives_the_same_bits_whatever_the_global_one_does() -> None:
    study = masks_study(
        model={"name": "unet", "channels": [4, 8], "residual_units": 0, "dropout": 0.5},
        data={"augmentation": {"flip": True, "noise": 0.1, "rotate_degrees": 10}},
    )
    torch.manual_seed(1)
    first = values(trained(study)[0])
    torch.manual_seed(2)
    expected_next = torch.rand(1)
    torch.manual_seed(2)
    again = values(trained(study)[0])
    assert torch.equal(first, again)
    assert torch.equal(torch.rand(1), expected_next)  # and leaves it alone
    assert not torch.equal(first, values(trained(study, seed=1)[0]))


def test_the_proximal_pull_is_zero_at_the_first_step_and_acts_at_the_second() -> None:
    plain, prox = classes_study(), classes_study(strategy={"name": "fedprox", "mu": 1.0})
    one = {"training": {"steps": 1}}
    assert torch.equal(
        values(trained(classes_study(**one))[0]),
        values(trained(classes_study(**one, strategy={"name": "fedprox", "mu": 1.0}))[0]),
    )
    start = values(build_study_network(plain))
    assert (values(trained(prox)[0]) - start).norm() < (values(trained(plain)[0]) - start).norm()


def test_the_proximal_gradient_is_added_between_backward_and_step() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    rule = gradient_rule(classes_study(strategy={"name": "fedprox", "mu": 0.5}), [weight])
    weight.data += 3.0
    weight.grad = torch.tensor([10.0])
    rule()
    assert weight.grad.tolist() == [10 + 0.5 * 3]


def test_a_loss_that_is_not_finite_ends_training() -> None:
    study = classes_study()
    data = site_data(study).splits[Split.TRAIN]
    data.images[3] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        trained(study, data)


class _OutOfMemory(torch.autograd.Function):
    where = "forward"

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        if _OutOfMemory.where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


class _Hungry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _OutOfMemory.apply(self.line(x.flatten(1)))
        return result


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_device_without_memory_is_told_with_the_way_out(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_OutOfMemory, "where", where)
    study = classes_study()
    with pytest.raises(TrainingError, match=r"training\.batch_size"):
        train_plain(_Hungry(), site_data(study).splits[Split.TRAIN], study, generator=torch.Generator())
