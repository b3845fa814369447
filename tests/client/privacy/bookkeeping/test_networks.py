"""Whole networks in float64: one backward pass agrees with a backward pass for each unit, and with Opacus."""

import copy
from collections.abc import Callable

import pytest
import torch
from monai.networks import nets
from torch import Tensor, nn
from torch.nn import functional

from medfl.client.privacy.bookkeeping.engine import clipped_sum_by_bookkeeping
from medfl.client.privacy.clipped import ClippedSum, UnitData, clipped_sum_by_loop
from medfl.client.privacy.opacus_engine import clipped_sum_by_opacus
from medfl.client.privacy.surgery import make_private_ready
from medfl.shared.zoo import DenseNet121Spec, LogisticSpec, ResNet18Spec, UNetSpec, build_network

TOLERANCE = 1e-9  # relative, float64
CLIP = 0.5


class Transformer(nn.Module):
    """Patches, positional embedding, class token, attention from linear layers, layer norms: a small ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 8, 8)
        self.positions = Positions(16)
        self.norm, self.mix = nn.LayerNorm(16), nn.Linear(16, 48)
        self.norm2, self.mlp = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.positions(self.patches(x).flatten(2).mT)
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        x = x + functional.scaled_dot_product_attention(q, k, v)
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


class Positions(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.position_embeddings = nn.Parameter(torch.randn(1, 17, width))
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.position_embeddings


class Reused(nn.Module):
    """One convolution called twice, and one weight owned by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight, self.head = self.a.weight, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(self.first(x)))).mean((2, 3))
        return self.head(self.b(torch.tanh(self.a(x))))


Network = Callable[[], nn.Module]
ZOO: dict[str, tuple[Network, int, int, bool]] = {  # name: network, dimensions, image size, is it a classifier
    "unet": (lambda: zoo(UNetSpec(channels=(8, 16, 32))), 2, 32, False),
    "unet-group": (lambda: zoo(UNetSpec(channels=(8, 16, 32), norm="group")), 2, 32, False),
    "unet-3d": (lambda: zoo(UNetSpec(channels=(4, 8), residual_units=1), 3), 3, 8, False),
    "unet-3d-group": (lambda: zoo(UNetSpec(channels=(4, 8), residual_units=0, norm="group"), 3), 3, 8, False),
    "unet-standardised": (
        lambda: zoo(UNetSpec(channels=(8, 16, 32), norm="group", weight_standardisation=True)), 2, 32, False
    ),
    "unet-standardised-3d": (
        lambda: zoo(UNetSpec(channels=(4, 8), norm="group", weight_standardisation=True), 3),
        3,
        8,
        False,
    ),
    "densenet121": (lambda: zoo(DenseNet121Spec(norm="group")), 2, 32, True),
    "resnet18": (lambda: zoo(ResNet18Spec(norm="group")), 2, 32, True),
    "resnet18-instance": (lambda: zoo(ResNet18Spec(norm="instance")), 2, 64, True),
    "resnet18-3d": (lambda: zoo(ResNet18Spec(norm="group"), 3), 3, 16, True),
    "logistic": (lambda: zoo(LogisticSpec(inputs=256)), 2, 16, True),
    "attention-unet": (lambda: nets.AttentionUnet(2, 1, 2, (4, 8, 16), (2, 2)), 2, 16, False),
    "basic-unet": (lambda: nets.BasicUNet(2, 1, 2, (4, 4, 8, 8, 16, 4)), 2, 32, False),
    "basic-unet-3d": (lambda: nets.BasicUNet(3, 1, 2, (2, 2, 4, 4, 4, 2)), 3, 32, False),
    "dynunet": (
        lambda: nets.DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16], res_block=True), 2, 16, False,
    ),
    "dynunet-3d": (lambda: nets.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[2, 4, 8]), 3, 8, False),
    "segresnet": (lambda: nets.SegResNet(2, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,)), 2, 16, False),
    "segresnet-3d": (lambda: nets.SegResNet(3, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,)), 3, 8, False),
    "vnet": (lambda: nets.VNet(2, 1, 2), 2, 16, False),
    "efficientnet-b0": (
        lambda: nets.EfficientNetBN("efficientnet-b0", pretrained=False, spatial_dims=2, in_channels=1, num_classes=2),
        2, 32, True,
    ),
    "transformer": (Transformer, 2, 32, True),
    "reused": (Reused, 2, 8, True),
}  # fmt: skip
OPACUS_CANNOT = {
    "unet-standardised",
    "unet-standardised-3d",
    "dynunet",
    "dynunet-3d",
    "transformer",
    "reused",
}  # registered twice, bare or shared parameters
LIKE_ANOTHER = {"resnet18-3d", "resnet18-instance"}


def zoo(spec: UNetSpec | DenseNet121Spec | ResNet18Spec | LogisticSpec, dimensions: int = 2) -> nn.Module:
    return build_network(spec, dimensions=dimensions, inputs=1, outputs=2, seed=0)


def prepared(name: str) -> tuple[nn.Module, list[UnitData]]:
    build, dimensions, size, classifies = ZOO[name]
    torch.manual_seed(0)
    network = build()
    make_private_ready(network)
    network = network.double().train()
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()  # dropout draws differently for three rows than for one
        if hasattr(module, "drop_connect_rate"):
            module.drop_connect_rate = 0.0
    shape = [1, *[size] * dimensions]
    labels = [1] if classifies else [1, *[size] * dimensions]
    return network, [(torch.randn(1, *shape).double() * (i + 1), torch.randint(0, 2, labels)) for i in range(2)]


def disagreement(a: ClippedSum, b: ClippedSum) -> tuple[float, float]:
    """Relative distance of the sums, and of the norms."""
    flat_a, flat_b = (torch.cat([part.reshape(-1) for part in whole.sums]) for whole in (a, b))
    flat_a, flat_b = flat_a.detach(), flat_b.detach()
    return float((flat_a - flat_b).norm() / flat_b.norm()), float(((a.norms - b.norms) / b.norms).abs().max())


@pytest.mark.parametrize("name", ZOO)
def test_one_backward_pass_equals_one_for_each_unit(name: str) -> None:
    network, units = prepared(name)
    before = copy.deepcopy(network.state_dict())
    reference = clipped_sum_by_loop(network, functional.cross_entropy, units, CLIP)
    measured = clipped_sum_by_bookkeeping(network, functional.cross_entropy, units, CLIP)
    assert max(disagreement(measured, reference)) < TOLERANCE
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any("forward" in vars(module) for module in network.modules() if list(module.parameters(recurse=False)))


@pytest.mark.parametrize("name", ["unet", "unet-3d-group", "unet-standardised", "resnet18", "transformer", "reused"])
def test_one_backward_pass_equals_one_for_each_unit_of_three_images(name: str) -> None:
    network, singles = prepared(name)
    units = [(torch.cat([images, -images, 2 * images]), labels.repeat_interleave(3, 0)) for images, labels in singles]
    reference = clipped_sum_by_loop(network, functional.cross_entropy, units, CLIP)
    measured = clipped_sum_by_bookkeeping(network, functional.cross_entropy, units, CLIP)
    assert max(disagreement(measured, reference)) < TOLERANCE


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("name", [name for name in ZOO if name not in OPACUS_CANNOT | LIKE_ANOTHER])
def test_one_backward_pass_equals_opacus(name: str) -> None:
    network, units = prepared(name)
    oracle = clipped_sum_by_opacus(network, functional.cross_entropy, units, CLIP)
    measured = clipped_sum_by_bookkeeping(network, functional.cross_entropy, units, CLIP)
    assert max(disagreement(measured, oracle)) < TOLERANCE
