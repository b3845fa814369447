"""The pretended GPU refuses what a real one would."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from pretended_gpu import pretended_gpu
from torch import Tensor, nn


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with pretended_gpu(monkeypatch):
        yield "cuda"


def test_what_is_made_of_something_on_the_gpu_lies_there_too(gpu: str) -> None:
    there = torch.arange(6.0, device=gpu)
    made = [there + 1, there[2:], there.view(2, 3).T, there.double(), torch.zeros_like(there), torch.zeros(1).to(there)]
    assert {str(one.device) for one in made} == {"cuda:0"}
    assert {str(one.device) for one in (there.cpu(), there.to("cpu"), torch.zeros(6))} == {"cpu"}
    assert there.is_cuda
    assert there.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_network_moves_with_its_gradients(gpu: str) -> None:
    network = nn.Conv2d(1, 2, 3).to(gpu)
    network(torch.ones(1, 1, 4, 4, device=gpu)).sum().backward()
    assert [str(p.grad.device) for p in network.parameters() if p.grad is not None] == ["cuda:0", "cuda:0"]
    assert {str(value.device) for value in network.state_dict().values()} == {"cuda:0"}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda there: there + torch.zeros(3),
        lambda there: there.index_select(0, torch.tensor([0])),
        lambda there: torch.cat([there, torch.zeros(3)]),
        lambda there: nn.Linear(3, 1)(there),
        lambda there: torch.quantile(there, torch.tensor([0.1, 0.9])),
        lambda there: torch.randn(3, generator=torch.Generator("cuda")),
        lambda there: torch.empty_like(there).normal_(generator=torch.Generator()),
        lambda there: there.pin_memory(),
    ],
)
def test_what_a_gpu_refuses_is_refused(gpu: str, wrong: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError):
        wrong(torch.zeros(3, device=gpu))


def test_numpy_cannot_look_into_a_gpu(gpu: str) -> None:
    with pytest.raises(TypeError, match="numpy"):
        torch.zeros(3, device=gpu).numpy()


def test_what_a_gpu_takes_is_taken(gpu: str) -> None:
    there, here = torch.zeros(3, device=gpu), torch.ones(3)
    there.copy_(here)
    there[torch.tensor([0])] = 2 * torch.ones(1, device=gpu)
    assert (there * torch.tensor(2.0)).tolist() == [4, 2, 2]
    assert there[torch.tensor([True, False, False])].device.type == "cuda"
