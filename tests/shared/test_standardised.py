from __future__ import annotations

import pytest
import torch
from torch import nn

from medfl.shared.standardised import (
    STANDARDISED,
    StandardisedConv2d,
    standardise_convolutions,
    standardised,
    through_standardisation,
)
from medfl.shared.zoo import ResNet18Spec, UNetSpec, build_network


def test_each_output_has_mean_0_and_variance_1_over_its_inputs() -> None:
    # 2, 4, 6, 8: mean 5, variance 5; over 4 inputs: (2 - 5) / sqrt(5 * 4) = -0.6708
    weight = torch.tensor([[2.0, 4.0, 6.0, 8.0], [1.0, 1.0, 1.0, 5.0]]).reshape(2, 1, 2, 2)
    assert standardised(weight)[0].flatten().tolist() == pytest.approx([-0.67082, -0.22361, 0.22361, 0.67082], abs=1e-5)
    assert standardised(weight).mean((1, 2, 3)).tolist() == pytest.approx([0, 0], abs=1e-7)
    assert standardised(weight).square().sum((1, 2, 3)).tolist() == pytest.approx([1, 1])


def test_shift_and_scale_of_a_weight_do_not_matter() -> None:
    weight = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(standardised(7 * weight + 3), standardised(weight), atol=1e-5)


def test_the_gradient_through_standardisation_is_autograds() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, 3, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    outer = torch.randn(4, 3, 2, 3, 3, generator=draw, dtype=torch.float64)
    expected = [torch.autograd.grad(standardised(weight), weight, one)[0] for one in outer]
    assert torch.allclose(through_standardisation(weight.detach(), outer), torch.stack(expected), atol=1e-12)


def test_a_network_keeps_its_weights_and_names_and_computes_with_standardised_ones() -> None:
    plain, changed = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)
    changed.load_state_dict(plain.state_dict())
    standardise_convolutions(nn.Sequential(changed))
    assert type(changed) is StandardisedConv2d
    assert changed.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(1, 2, 5, 5)
    expected = nn.functional.conv2d(images, standardised(plain.weight), plain.bias)
    assert torch.allclose(changed(images), expected)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_networks_of_the_zoo_are_standardised_where_a_study_asks_for_it(dimensions: int) -> None:
    specs = (ResNet18Spec(norm="group"), UNetSpec(channels=(4, 8), norm="group"))
    for spec in specs:
        both = [
            build_network(one, dimensions=dimensions, inputs=1, outputs=2, seed=0)
            for one in (spec, spec.model_copy(update={"weight_standardisation": True}))
        ]
        counts = [sum(type(module) in STANDARDISED for module in network.modules()) for network in both]
        assert counts[0] == 0
        assert counts[1] > 3
        for one, other in zip(both[0].parameters(), both[1].parameters(), strict=True):
            assert torch.equal(one, other)
