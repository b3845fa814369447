"""Networks become trainable with privacy, compute what they should, and every change is told."""

import copy

import pytest
import torch
from monai.networks import nets
from torch import Tensor, nn

from medfl.client.privacy.refusals import require_private_network
from medfl.client.privacy.surgery import make_private_ready

IMAGES = torch.randn(2, 1, 32, 32)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_batch_norms_become_group_norms_that_keep_scale_and_shift() -> None:
    network = nn.Sequential(nn.BatchNorm2d(12), nn.Sequential(nn.BatchNorm3d(7, affine=False)))
    nn.init.constant_(network[0].weight, 3.0)
    network[0].requires_grad_(False)
    changes = make_private_ready(network)
    assert changes == ["2 BatchNorm layers: each became GroupNorm of up to 8 groups"]
    first, second = network[0], network[1][0]
    assert isinstance(first, nn.GroupNorm)
    assert (first.num_groups, first.num_channels) == (4, 12)  # gcd(8, 12)
    assert first.weight.eq(3.0).all()
    assert isinstance(second, nn.GroupNorm)
    assert (second.num_groups, second.affine) == (1, False)  # gcd(8, 7)


def test_a_ready_network_is_left_alone() -> None:
    assert make_private_ready(nets.UNet(2, 1, 2, (4, 8), (2,)), IMAGES) == []


def test_instance_norms_stop_to_keep_statistics() -> None:
    network = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True))
    assert make_private_ready(network) == ["1 InstanceNorm layer: each no longer keeps running statistics"]
    network(IMAGES)
    assert network.state_dict() == {}


def test_unused_parameters_are_frozen_and_named() -> None:
    network = Unused()
    (change,) = make_private_ready(network, IMAGES)
    assert change == "2 unused parameters: each was frozen: spare.weight, spare.bias"
    assert [p.requires_grad for p in network.parameters()] == [True, True, False, False]


@pytest.mark.parametrize(
    "network",
    [
        nets.SegResNet(2, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,)),
        nets.DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16], res_block=True),
        nets.resnet18(spatial_dims=2, n_input_channels=1, num_classes=2, shortcut_type="B"),
        nets.ResNet("bottleneck", [1, 1, 1, 1], [8, 8, 8, 8], spatial_dims=2, n_input_channels=1),
    ],
    ids=lambda network: type(network).__name__,
)
def test_rewritten_residual_blocks_compute_the_same(network: nn.Module) -> None:
    for module in list(network.modules()):  # only the blocks are to change
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    expected = network.eval()(IMAGES)
    changes = make_private_ready(network)
    assert any("adds its shortcut out of place" in change for change in changes)
    torch.testing.assert_close(network(IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_changed_networks_can_be_copied_and_changed_once_only() -> None:
    network = nets.resnet18(spatial_dims=2, n_input_channels=1, num_classes=2, shortcut_type="B")
    assert len(make_private_ready(network)) == 3
    assert make_private_ready(network) == []
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert network.eval()(IMAGES).abs().sum() > 0


@pytest.mark.parametrize(
    "network",
    [
        nets.resnet18(spatial_dims=2, n_input_channels=1, num_classes=2, shortcut_type="B"),
        nets.DenseNet121(2, 1, 2),
        nets.AttentionUnet(2, 1, 2, (4, 8, 16), (2, 2)),
    ],
    ids=lambda network: type(network).__name__,
)
def test_what_surgery_leaves_passes_the_refusals(network: nn.Module) -> None:
    with pytest.raises(Exception, match="BatchNorm"):
        require_private_network(network, IMAGES)
    make_private_ready(network, IMAGES)
    require_private_network(network, IMAGES)
