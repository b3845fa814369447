"""Adapters change nothing at first, are exact in one private backward pass, and fold into a plain network."""

from __future__ import annotations

import pytest
import torch
from monai.networks import nets
from torch import nn

from medfl.client.privacy.bookkeeping.engine import clipped_sum_by_bookkeeping
from medfl.client.privacy.clipped import clipped_sum_by_loop
from medfl.shared.adapters import adapter_tensors, add_adapters, fold_adapters
from medfl.shared.errors import ConfigError


def network(dimensions: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nets.UNet(dimensions, 1, 2, (8, 16), (2,), num_res_units=2).double()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_adapters_change_nothing_at_first_and_no_name(dimensions: int) -> None:
    plain, adapted = network(dimensions), network(dimensions)
    assert add_adapters(adapted, 2, seed=1) > 0
    image = torch.randn(2, 1, *[8] * dimensions).double()
    adapted.double()
    assert torch.equal(plain(image), adapted(image))
    assert set(plain.state_dict()) < set(adapted.state_dict())
    assert set(adapted.state_dict()) - set(plain.state_dict()) == adapter_tensors(adapted)


def test_an_adapter_has_so_many_values() -> None:
    # 8 to 16 channels by a 3x3 kernel at rank 2: down 2 * 8 * 9 = 144, up 16 * 2 = 32
    conv = nn.Sequential(nn.Conv2d(8, 16, 3))
    add_adapters(conv, 2, seed=0)
    values = conv.state_dict()
    assert sum(values[name].numel() for name in adapter_tensors(conv)) == 144 + 32


def test_the_same_seed_gives_the_same_adapters_whatever_was_drawn_before() -> None:
    first, second = network(), network()
    add_adapters(first, 2, seed=5)
    torch.randn(7)
    add_adapters(second, 2, seed=5)
    for name in adapter_tensors(first):
        assert torch.equal(first.state_dict()[name], second.state_dict()[name])


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_folded_network_is_the_same_function_and_plain(stride: int, padding_mode: str) -> None:
    torch.manual_seed(3)
    adapted = nn.Sequential(nn.Conv2d(3, 5, 3, stride, 1, padding_mode=padding_mode), nn.Conv2d(5, 4, 1)).double()
    add_adapters(adapted, 2, seed=0)
    adapted.double()
    for name, parameter in adapted.named_parameters():
        if "up" in name:
            nn.init.normal_(parameter)
    image = torch.randn(2, 3, 9, 9).double()
    before = adapted(image)
    fold_adapters(adapted)
    torch.testing.assert_close(adapted(image), before)
    assert [type(layer) for layer in adapted] == [nn.Conv2d, nn.Conv2d]
    assert list(adapted.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_narrow_grouped_and_named_convolutions_get_none() -> None:
    layers = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3))
    assert add_adapters(layers, 4, seed=0, skip=frozenset({"3.weight"})) == 1
    assert adapter_tensors(layers) == {"2.down.weight", "2.up.weight"}


def test_a_network_without_wide_convolutions_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="adapter_rank"):
        adapter_tensors(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_private_gradients_of_adapters_are_exact() -> None:
    adapted = network()
    add_adapters(adapted, 2, seed=1)
    adapted.double()
    trained = adapter_tensors(adapted)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(name in trained)
        if name.endswith("up.weight"):
            nn.init.normal_(parameter)
    units = [(torch.randn(1, 1, 8, 8).double(), torch.randn(1).double()) for _ in range(3)]

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (outputs.flatten(1).mean(1) - labels).square().mean() + outputs.square().mean()

    slow = clipped_sum_by_loop(adapted, loss, units, 0.5)
    fast = clipped_sum_by_bookkeeping(adapted, loss, units, 0.5)
    torch.testing.assert_close(fast.norms, slow.norms, rtol=1e-9, atol=0)
    for ours, theirs in zip(fast.sums, slow.sums, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
