"""Convolutions with standardised weights (Qiao et al. 2019, https://arxiv.org/abs/1903.10520): they train better with
group norm, and under differential privacy (De et al. 2022, https://arxiv.org/abs/2204.13650).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_EPSILON = 1e-5


def standardised(weight: Tensor) -> Tensor:
    """``weight`` (outputs, ...) with mean 0 and variance 1 / fan-in for each output: activations keep theirs."""
    axes = tuple(range(1, weight.dim()))
    variance, mean = torch.var_mean(weight, dim=axes, correction=0, keepdim=True)
    scaled: Tensor = (weight - mean) * torch.rsqrt((variance + _EPSILON**2) * weight[0].numel())
    return scaled


def through_standardisation(weight: Tensor, gradients: Tensor) -> Tensor:
    """Gradients (units, *weight.shape) with respect to the standardised weight, as ones with respect to ``weight``.

    The same linear map for every unit, since the weight is shared.
    """
    axes = tuple(range(1, weight.dim()))
    variance, mean = torch.var_mean(weight, dim=axes, correction=0, keepdim=True)
    spread = torch.sqrt(variance + _EPSILON**2)
    unit = (weight - mean) / spread
    inner = tuple(axis + 1 for axis in axes)
    centred: Tensor = (
        gradients - gradients.mean(inner, keepdim=True) - unit * (gradients * unit).mean(inner, keepdim=True)
    )
    scale: float = weight[0].numel() ** 0.5
    return centred / (spread * scale)


class StandardisedConv2d(nn.Conv2d):
    """A 2D convolution by its standardised weight; parameters have the plain convolution's names and shapes."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = super()._conv_forward(input, standardised(weight), bias)
        return output


class StandardisedConv3d(nn.Conv3d):
    """A 3D convolution by its standardised weight."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = super()._conv_forward(input, standardised(weight), bias)
        return output


STANDARDISED = (StandardisedConv2d, StandardisedConv3d)


def standardise_convolutions(network: nn.Module) -> None:
    """Turn every plain 2D and 3D convolution with more than one input per output into a standardised one, in place."""
    kinds: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: StandardisedConv2d, nn.Conv3d: StandardisedConv3d}
    for module in network.modules():
        kind = kinds.get(type(module))
        if kind is not None and module.weight[0].numel() > 1:  # type: ignore[index]
            module.__class__ = kind  # same parameters and settings, another forward
