"""Rule for Conv1-3d and ConvTranspose1-3d: any stride, dilation, groups and padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from medfl.client.privacy.bookkeeping.rule import (
    Deferred,
    UnitGradients,
    at_least_single,
    sum_over_positions,
    trained,
    zero_where_dropped,
)
from medfl.shared.standardised import standardised, through_standardisation

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Norms from position-by-position products cost T^2 (D + P) operations against D P T of instantiating, but run as two
# dense matrix products, and instantiating also writes units x D x P numbers. Measured break-even on two CPUs: 30.
_DENSE_ADVANTAGE = 30.0

# From this many input times output channels, in two dimensions, one product for each offset in the kernel is faster
# than a grouped convolution: up to twice at 128 x 128 channels, the same at 64 x 128. Measured on two CPUs.
_WIDE = 96 * 96


@dataclass(frozen=True, slots=True)
class _Geometry:
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


class ConvolutionRule:
    """See :class:`~medfl.client.privacy.bookkeeping.rule.Rule`."""

    def prepare(self, module: _ConvNd, x: Tensor, /) -> Tensor:
        """Pad as the module would, except for plain symmetric zeros, which the convolution does itself."""
        if not _pads_before(module):
            return x
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)

    def forward(self, module: _ConvNd, x: Tensor, /) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Convolve; keep the (padded) input."""
        at = _geometry(module)
        if module.transposed:
            transpose = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[
                x.dim() - 3
            ]
            y = transpose(
                x, module.weight, module.bias, at.stride, at.padding, at.output_padding, at.groups, at.dilation
            )
        else:
            convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[x.dim() - 3]
            y = convolve(x, module.weight, module.bias, at.stride, at.padding, at.dilation, at.groups)
        return y, (x,)

    def backward(
        self, module: _ConvNd, saved: tuple[Tensor, ...], g: Tensor, /, *, wants_input: bool, defer: bool
    ) -> tuple[Tensor | None, UnitGradients]:
        """Input: one batched call. Weight: the cheapest of five ways, by its shape."""
        x, at = saved[0], _geometry(module)
        towards = _backward(g, x, module.weight.to(g.dtype), at, (True, False, False))[0] if wants_input else None
        found: UnitGradients = {}
        if trained(module, "bias"):
            found["bias"] = sum_over_positions(g)
        if trained(module, "weight"):
            if at.transposed:
                # A transposed convolution is the input gradient of a plain one: its weight gradient is the plain
                # one's with input and output gradient exchanged.
                x, g = g, x
            at = _Geometry(at.stride, at.padding, at.dilation, False, [0] * len(at.stride), at.groups)
            if defer and _unfolds_outputs(module.weight, g, at):
                found["weight"] = _from_unfolded_outputs(module.weight, x, g, at)
            elif defer and _is_deferred_cheaper(module.weight, g, at):
                x, g = at_least_single(x), at_least_single(g)
                found["weight"] = Deferred(
                    _squared_norms(module.weight, x, g, at), partial(_weighted_sum, module.weight, x, g, at)
                )
            elif defer and _goes_by_offset(module.weight, at):
                found["weight"] = _added_later(_by_offset(module.weight, x, g, at), _kernel_last)
            else:
                found["weight"] = _instantiated(module.weight, x, g, at)
        return towards, found


class StandardisedConvolutionRule(ConvolutionRule):
    """The same for convolutions with standardised weights; weight gradients are always instantiated."""

    def forward(self, module: _ConvNd, x: Tensor, /) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Convolve by the standardised weight; keep the (padded) input."""
        return super().forward(_with_weight(module), x)

    def backward(
        self, module: _ConvNd, saved: tuple[Tensor, ...], g: Tensor, /, *, wants_input: bool, defer: bool
    ) -> tuple[Tensor | None, UnitGradients]:
        """As the plain convolution's, the weight gradients taken through the standardisation."""
        towards, found = super().backward(_with_weight(module), saved, g, wants_input=wants_input, defer=False)
        if isinstance(weight := found.get("weight"), Tensor):
            found["weight"] = through_standardisation(module.weight.detach().to(weight.dtype), weight)
        return towards, found


def _with_weight(module: _ConvNd) -> Any:
    """``module`` to look at, with its standardised weight in place of the weight."""
    return _View(module, standardised(module.weight.detach()))


class _View:
    def __init__(self, module: _ConvNd, weight: Tensor) -> None:
        self._module, self.weight = module, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _pads_before(module: _ConvNd) -> bool:
    if module.transposed:
        return False
    if module.padding_mode != "zeros":
        return True
    sides = module._reversed_padding_repeated_twice  # for padding="same" the two sides of an axis can differ
    return isinstance(module.padding, str) and any(a != b for a, b in zip(sides[::2], sides[1::2], strict=True))


def _geometry(module: _ConvNd) -> _Geometry:
    padding: list[int]
    if _pads_before(module):
        padding = [0] * len(module.kernel_size)
    elif isinstance(module.padding, str):
        padding = list(reversed(module._reversed_padding_repeated_twice[::2]))
    else:
        padding = [int(side) for side in module.padding]
    return _Geometry(
        list(module.stride),
        padding,
        list(module.dilation),
        module.transposed,
        list(module.output_padding),
        module.groups,
    )


def _backward(
    g: Tensor, x: Tensor, weight: Tensor, at: _Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        g,
        x,
        weight,
        None,
        at.stride,
        at.padding,
        at.dilation,
        at.transposed,
        at.output_padding,
        at.groups,
        list(wanted),
    )
    return found


def _is_deferred_cheaper(weight: Tensor, g: Tensor, at: _Geometry) -> bool:
    if at.groups != 1 or (g.dim() != 4 and any(step != 1 for step in at.dilation)):
        return False
    positions, outputs = g.shape[2:].numel(), weight.shape[0]
    inputs = weight.numel() // outputs
    return positions**2 * (inputs + outputs) < _DENSE_ADVANTAGE * inputs * outputs


def _instantiated(weight: Tensor, x: Tensor, g: Tensor, at: _Geometry) -> Tensor:
    """(units, *weight.shape). The batch becomes groups of one convolution, so no weight gradient is summed."""
    units = x.shape[0]
    pointwise = all(size == 1 for size in weight.shape[2:]) and set(at.stride) == {1} and not any(at.padding)
    if at.groups == 1 and pointwise:
        return torch.bmm(g.flatten(2), x.flatten(2).mT).view(units, *weight.shape)
    if _goes_by_offset(weight, at):
        return torch.stack([_kernel_last(one) for one in _by_offset(weight, x, g, at)])
    stacked = weight.detach().to(g.dtype).expand(units, *weight.shape).reshape(-1, *weight.shape[1:])
    grouped = _Geometry(at.stride, at.padding, at.dilation, False, at.output_padding, at.groups * units)
    flat_g, flat_x = g.reshape(1, -1, *g.shape[2:]), x.reshape(1, -1, *x.shape[2:])
    return _backward(flat_g, flat_x, stacked, grouped, (False, True, False))[1].view(units, *weight.shape)


def _unfolds_outputs(weight: Tensor, g: Tensor, at: _Geometry) -> bool:
    """Whether to unfold the output gradient: few positions and output channels, many input channels, 2D, stride 1."""
    outputs, inputs, *kernel = weight.shape
    slides = at.groups == 1 and g.dim() == 4 and set(at.stride) == {1} and math.prod(kernel) > 1
    reach = [d * (k - 1) for d, k in zip(at.dilation, kernel, strict=True)]
    few = g.shape[2:].numel() <= 64 and 2 * outputs <= inputs  # measured on two CPUs
    return slides and few and all(pad <= r for pad, r in zip(at.padding, reach, strict=True))


def _from_unfolded_outputs(weight: Tensor, x: Tensor, g: Tensor, at: _Geometry) -> Deferred:
    """dW[o, i, k] = sum over q of x[i, q] g[o, q - k + padding]: one product, with the kernel's axes reversed in it."""
    outputs, inputs, *kernel = weight.shape
    around = [d * (k - 1) - pad for d, k, pad in zip(at.dilation, kernel, at.padding, strict=True)]
    shifted = functional.unfold(g, tuple(kernel), tuple(at.dilation), tuple(around))  # (units, outputs x kernel, q)
    product = torch.bmm(shifted, x.flatten(2).mT).view(-1, outputs, *kernel, inputs)
    return _added_later(product, lambda total: total.flip(1, 2).permute(0, 3, 1, 2))


def _goes_by_offset(weight: Tensor, at: _Geometry) -> bool:
    outputs, inputs, *kernel = weight.shape
    return at.groups == 1 and len(kernel) == 2 and math.prod(kernel) > 1 and outputs * inputs >= _WIDE


def _by_offset(weight: Tensor, x: Tensor, g: Tensor, at: _Geometry) -> Tensor:
    """dW[o, i, k] = sum over t of g[o, t] x[i, stride t + dilation k - padding]: (units, *kernel, outputs, inputs)."""
    outputs, inputs, *kernel = weight.shape
    x = functional.pad(x, [side for pad in reversed(at.padding) for side in (pad, pad)])
    rows, product = g.flatten(2), x.new_empty(len(x), *kernel, outputs, inputs)
    for place, offset in enumerate(itertools.product(*map(range, kernel))):
        starts = [k * dilation for k, dilation in zip(offset, at.dilation, strict=True)]
        ends = [a + step * (n - 1) + 1 for a, step, n in zip(starts, at.stride, g.shape[2:], strict=True)]
        seen = x
        for axis, (start, end, step) in enumerate(zip(starts, ends, at.stride, strict=True)):
            seen = seen[(slice(None),) * (2 + axis) + (slice(start, end, step),)]
        torch.bmm(rows, seen.reshape(len(x), inputs, -1).mT, out=product.view(len(x), -1, outputs, inputs)[:, place])
    return product


def _kernel_last(gradient: Tensor) -> Tensor:
    """(*kernel, outputs, inputs) -> (outputs, inputs, *kernel)."""
    axes = gradient.dim() - 2
    return gradient.permute(axes, axes + 1, *range(axes))


def _added_later(product: Tensor, in_order: Callable[[Tensor], Tensor]) -> Deferred:
    """For gradients (units, ...) whose axes are not the weight's: only their sum is brought ``in_order``."""

    def weighted_sum(factors: Tensor) -> Tensor:
        rows = at_least_single(zero_where_dropped(product, factors).flatten(1))
        return in_order(torch.mv(rows.t(), factors.to(rows.dtype)).view(product.shape[1:]))

    return Deferred(torch.linalg.vector_norm(at_least_single(product.flatten(1)), dim=1).square(), weighted_sum)


def _squared_norms(weight: Tensor, x: Tensor, g: Tensor, at: _Geometry) -> Tensor:
    """||sum_t g_t x_t'||^2 = sum over positions s, t of (x_s . x_t)(g_s . g_t), for each unit."""
    patches, outputs = _patches(x, weight.shape[2:], at), g.flatten(2)
    return torch.einsum("uij,uij->u", patches.mT @ patches, outputs.mT @ outputs)


def _patches(x: Tensor, kernel: torch.Size, at: _Geometry) -> Tensor:
    """(units, inputs x kernel, positions): what the kernel sees at each output position."""
    if len(kernel) == 2:
        return functional.unfold(x, tuple(kernel), tuple(at.dilation), tuple(at.padding), tuple(at.stride))
    x = functional.pad(x, [side for axis in reversed(at.padding) for side in (axis, axis)])
    for axis, (size, step) in enumerate(zip(kernel, at.stride, strict=True)):
        x = x.unfold(2 + axis, size, step)
    axes = len(kernel)
    order = (0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))
    return x.permute(order).reshape(x.shape[0], x.shape[1] * math.prod(kernel), -1)


def _weighted_sum(weight: Tensor, x: Tensor, g: Tensor, at: _Geometry, factors: Tensor) -> Tensor:
    g = zero_where_dropped(g, factors) * factors.to(g.dtype).view(-1, *[1] * (g.dim() - 1))
    return _backward(g, zero_where_dropped(x, factors), weight.detach().to(g.dtype), at, (False, True, False))[1]
