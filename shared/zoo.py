"""The networks a study may name, and how each is built from its settings."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StrictBool, model_validator

from medfl.shared.config import Settings

if TYPE_CHECKING:
    from torch import nn

Norm = Literal["batch", "group", "instance"]


class UNetSpec(Settings):
    """MONAI ``UNet`` (Kerfoot et al. 2019, https://doi.org/10.1007/978-3-030-12029-0_40) in two or three dimensions."""

    name: Literal["unet"] = "unet"
    channels: tuple[int, ...] = Field(default=(16, 32, 64, 128), min_length=2, max_length=8)
    strides: tuple[int, ...] | None = None  # absent: 2 at every level
    residual_units: int = Field(default=2, ge=0, le=4)
    norm: Norm = "instance"
    weight_standardisation: StrictBool = False
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _levels_match(self) -> UNetSpec:
        if any(not 1 <= width <= 2048 for width in self.channels):
            raise ValueError("channels must each be between 1 and 2048")
        if self.strides is not None and len(self.strides) != len(self.channels) - 1:
            raise ValueError(f"strides must have one value fewer than channels ({len(self.channels) - 1})")
        if self.strides is not None and any(stride not in (1, 2) for stride in self.strides):
            raise ValueError("strides must be 1 or 2")
        return self

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Stride of each level."""
        return self.strides or (2,) * (len(self.channels) - 1)


class DenseNet121Spec(Settings):
    """MONAI ``DenseNet121`` (Huang et al. 2017, https://arxiv.org/abs/1608.06993), without pretrained weights."""

    name: Literal["densenet121"] = "densenet121"
    norm: Norm = "batch"
    weight_standardisation: StrictBool = False
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)


class ResNet18Spec(Settings):
    """MONAI ``resnet18`` (He et al. 2016, https://arxiv.org/abs/1512.03385), without pretrained weights."""

    name: Literal["resnet18"] = "resnet18"
    norm: Norm = "batch"
    weight_standardisation: StrictBool = False


class LogisticSpec(Settings):
    """Logistic regression on the flattened image: the smallest model, for baselines and protocol tests."""

    name: Literal["logistic"] = "logistic"
    inputs: int = Field(ge=1, le=10_000_000)  # channels x pixels of one image


AnySpec = UNetSpec | DenseNet121Spec | ResNet18Spec | LogisticSpec
ModelSpec = Annotated[AnySpec, Field(discriminator="name")]


class ModelTask(StrEnum):
    """What a network's output means."""

    SEGMENTATION = "segmentation"
    CLASSIFICATION = "classification"


def tasks_of(spec: AnySpec) -> frozenset[ModelTask]:
    """The tasks a network of this kind can do."""
    return frozenset({ModelTask.SEGMENTATION if isinstance(spec, UNetSpec) else ModelTask.CLASSIFICATION})


def check_size(spec: AnySpec, *, channels: int, size: tuple[int, ...]) -> None:
    """Raise ValueError when the network cannot take images of ``channels`` and ``size``."""
    match spec:
        case LogisticSpec(inputs=inputs) if inputs != channels * math.prod(size):
            raise ValueError(f"model.inputs must be {channels * math.prod(size)}, channels times pixels of an image")
        case UNetSpec():
            smallest = math.prod(spec.step_sizes)
            if any(extent % smallest for extent in size):
                raise ValueError(f"data.preprocessing.size must be multiples of {smallest}, the network's strides")
            if spec.norm == "instance" and all(extent == smallest for extent in size):
                raise ValueError(
                    "data.preprocessing.size leaves one pixel at the network's lowest level, which instance norm "
                    "cannot use: choose larger images or fewer channels"
                )


def build_network(
    spec: AnySpec,
    *,
    dimensions: int,
    inputs: int,
    outputs: int,
    seed: int,
) -> nn.Module:
    """Build the network with weights drawn from ``seed`` only; the global generator is left as it was.

    Args:
        spec: which network.
        dimensions: 2 or 3 spatial axes of the images.
        inputs: image channels.
        outputs: output channels (classes).
        seed: the same seed gives the same weights on every machine of a kind.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _construct(spec, dimensions, inputs, outputs)
        if getattr(spec, "norm", None) in ("group", "instance") and not isinstance(spec, UNetSpec):
            _replace_batch_norm(network, groups=8 if spec.norm == "group" else None)  # type: ignore[union-attr]
        elif isinstance(spec, UNetSpec) and spec.norm == "group":
            _replace_batch_norm(network, groups=8)
        if getattr(spec, "weight_standardisation", False):
            from medfl.shared.standardised import standardise_convolutions

            standardise_convolutions(network)
    return network


def _construct(spec: AnySpec, dimensions: int, inputs: int, outputs: int) -> nn.Module:
    from monai.networks.nets.densenet import DenseNet121
    from monai.networks.nets.resnet import resnet18
    from monai.networks.nets.unet import UNet
    from torch import nn

    match spec:
        case UNetSpec():
            return UNet(
                spatial_dims=dimensions,
                in_channels=inputs,
                out_channels=outputs,
                channels=spec.channels,
                strides=spec.step_sizes,
                num_res_units=spec.residual_units,
                norm="instance" if spec.norm == "instance" else "batch",
                dropout=spec.dropout,
            )
        case DenseNet121Spec():
            return DenseNet121(
                spatial_dims=dimensions, in_channels=inputs, out_channels=outputs, dropout_prob=spec.dropout
            )
        case ResNet18Spec():
            # MONAI's own norm= argument changes the stem only; the rest is replaced after construction.
            return resnet18(spatial_dims=dimensions, n_input_channels=inputs, num_classes=outputs, shortcut_type="B")
        case LogisticSpec():
            return nn.Sequential(nn.Flatten(), nn.Linear(spec.inputs, outputs))


def _replace_batch_norm(module: nn.Module, groups: int | None) -> None:
    """Replace each batch norm by group norm of gcd(``groups``, channels) groups, or by one group a channel."""
    from torch import nn

    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            channels = child.num_features
            parts = channels if groups is None else math.gcd(groups, channels)
            setattr(module, name, nn.GroupNorm(parts, channels))
        else:
            _replace_batch_norm(child, groups)
