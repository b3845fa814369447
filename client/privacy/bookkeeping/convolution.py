"""Rule for Conv1-3d and ConvTranspose1-3d: any stride, dilation, groups and padding."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from medfl.client.privacy.bookkeeping.rule import (
    Deferred,
    Scales,
    UnitGradients,
    at_least_single,
    by_unit,
    sum_over_positions,
    trained,
)
from medfl.client.privacy.clipped import row_norms
from medfl.shared.standardised import standardised, through_standardisation

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Products of positions take Tin^2 D + T^2 (P + 8 K) operations and as many numbers, against D K P T of instantiating,
# of which units x D K P numbers are kept until all norms are known. On one CPU the two cost the same at 46 (300 to 128
# channels, pointwise, 8 x 8), products were faster at 26 and below, instantiating at 400 and above.
_DENSE_ADVANTAGE = 50.0

# From this many input times output channels, in two dimensions, one product for each offset in the kernel can be faster
# than a grouped convolution: at 128 x 128 channels it took half the time on two CPUs and twice the time on a third.
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
        self, module: _ConvNd, saved: tuple[Tensor, ...], g: Tensor, /, *, units: int, wants_input: bool, defer: bool
    ) -> tuple[Tensor | None, UnitGradients]:
        """Input: one batched call. Weight: the cheapest of four ways, by its shape."""
        x, at = saved[0], _geometry(module)
        towards = _backward(g, x, module.weight.to(g.dtype), at, (True, False, False))[0] if wants_input else None
        found: UnitGradients = {}
        if trained(module, "bias"):
            found["bias"] = by_unit(sum_over_positions(g), units)
        if trained(module, "weight"):
            if at.transposed:
                # A transposed convolution is the input gradient of a plain one: its weight gradient is the plain
                # one's with input and output gradient exchanged.
                x, g = g, x
            at = _Geometry(at.stride, at.padding, at.dilation, False, [0] * len(at.stride), at.groups)
            if defer and _is_deferred_cheaper(*_folded(module.weight, x, g, at, units)):
                x, g = at_least_single(x), at_least_single(g)
                found["weight"] = Deferred(
                    _squared_norms(*_folded(module.weight, x, g, at, units)),
                    partial(_weighted_sum, module.weight, x, g, at),
                )
            elif defer and _goes_by_offset(module.weight, x, g, at, units):
                found["weight"] = _added_later(_by_offset(*_folded(module.weight, x, g, at, units)), _kernel_last)
            else:
                found["weight"] = _instantiated(module.weight, x, g, at, units)
        return towards, found


class StandardisedConvolutionRule(ConvolutionRule):
    """The same for convolutions with standardised weights; weight gradients are always instantiated."""

    def forward(self, module: _ConvNd, x: Tensor, /) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Convolve by the standardised weight; keep the (padded) input."""
        return super().forward(_with_weight(module), x)

    def backward(
        self, module: _ConvNd, saved: tuple[Tensor, ...], g: Tensor, /, *, units: int, wants_input: bool, defer: bool
    ) -> tuple[Tensor | None, UnitGradients]:
        """As the plain convolution's, the weight gradients taken through the standardisation."""
        towards, found = super().backward(
            _with_weight(module), saved, g, units=units, wants_input=wants_input, defer=False
        )
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


def _is_deferred_cheaper(weight: Tensor, x: Tensor, g: Tensor, at: _Geometry) -> bool:
    if at.groups != 1:
        return False
    before, after = x.shape[2:].numel(), g.shape[2:].numel()
    outputs, inputs, *kernel = weight.shape
    cost = before**2 * inputs + after**2 * (outputs + 8 * math.prod(kernel))
    return cost < _DENSE_ADVANTAGE * weight.numel()


def _is_pointwise(weight: Tensor, at: _Geometry) -> bool:
    return math.prod(weight.shape[2:]) == 1 and set(at.stride) == {1} and not any(at.padding)


def _instantiated(weight: Tensor, x: Tensor, g: Tensor, at: _Geometry, units: int) -> Tensor:
    """(units, *weight.shape)."""
    if at.groups == 1 and _is_pointwise(weight, at):
        _, seen, gradient, _ = _folded(weight, x, g, at, units)
        return torch.bmm(gradient.flatten(2), seen.flatten(2).mT).view(units, *weight.shape)
    if _goes_by_offset(weight, x, g, at, units):
        product = _by_offset(*_folded(weight, x, g, at, units))
        return torch.stack([_kernel_last(one) for one in product]).view(units, *weight.shape)
    if weight.numel() < x[0].numel():  # a gradient for each row takes less than the rows themselves
        return by_unit(_grouped(weight, x, g, at, x.shape[0]), units)
    return _grouped(weight, x, g, at, units)


def _folded(
    weight: Tensor, x: Tensor, g: Tensor, at: _Geometry, units: int
) -> tuple[Tensor, Tensor, Tensor, _Geometry]:
    """The rows of a unit as one more axis in front of space, along which the kernel has length one.

    ``x`` and ``g`` (rows, channels, *space) become views (units, channels, rows of each, *space). With one row for each
    unit everything stays as it is.
    """
    if x.shape[0] == units:
        return weight, x, g, at
    x, g = (rows.view(units, -1, *rows.shape[1:]).transpose(1, 2) for rows in (x, g))
    longer = _Geometry([1, *at.stride], [0, *at.padding], [1, *at.dilation], False, [0, *at.output_padding], at.groups)
    return weight.unsqueeze(2), x, g, longer


def _grouped(weight: Tensor, x: Tensor, g: Tensor, at: _Geometry, units: int) -> Tensor:
    """The units become groups of one convolution, so that their weight gradients are not summed."""
    stacked = g.new_empty(units * weight.shape[0], *weight.shape[1:])  # tells the shape; its values are not read
    grouped = _Geometry(at.stride, at.padding, at.dilation, False, at.output_padding, at.groups * units)
    x, g = (rows.view(units, -1, *rows.shape[1:]).transpose(0, 1).flatten(1, 2) for rows in (x, g))
    return _backward(g, x, stacked, grouped, (False, True, False))[1].view(units, *weight.shape)


_by_offset_is_faster: dict[tuple[object, ...], bool] = {}
"""By layer and size of its input, as this machine has shown it."""


def _goes_by_offset(weight: Tensor, x: Tensor, g: Tensor, at: _Geometry, units: int) -> bool:
    outputs, inputs, *kernel = weight.shape
    if at.groups != 1 or len(kernel) != 2 or math.prod(kernel) == 1 or outputs * inputs < _WIDE:
        return False
    each = x.shape[0] // units
    key = (weight.shape, each, x.shape[1:], g.shape[1:], *at.stride, *at.padding, *at.dilation, g.dtype, g.device)
    if key not in _by_offset_is_faster:
        x, g = x[: 2 * each], g[: 2 * each]  # of two units, which takes little memory
        units = x.shape[0] // each
        by_offset = partial(_by_offset, *_folded(weight, x, g, at, units))
        _by_offset_is_faster[key] = _seconds(by_offset) < _seconds(partial(_grouped, weight, x, g, at, units))
    return _by_offset_is_faster[key]


def _seconds(work: Callable[[], Tensor]) -> float:
    """How long ``work`` takes when it has been done once before: kernels are chosen and built at the first time."""
    on_gpu = work().is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _by_offset(weight: Tensor, x: Tensor, g: Tensor, at: _Geometry) -> Tensor:
    """dW[o, i, k] = sum over t of g[o, t] x[i, stride t + dilation k - padding]: (units, *kernel, outputs, inputs)."""
    outputs, inputs, *kernel = weight.shape
    x = functional.pad(x, [side for pad in reversed(at.padding) for side in (pad, pad)])
    rows, product = g.flatten(2), x.new_empty(x.shape[0], *kernel, outputs, inputs)
    for place, window in enumerate(_windows(kernel, g.shape[2:], at)):
        seen = x[(slice(None), slice(None), *window)].reshape(x.shape[0], inputs, -1)
        torch.bmm(rows, seen.mT, out=product.view(x.shape[0], -1, outputs, inputs)[:, place])
    return product


def _windows(kernel: Sequence[int], positions: Sequence[int], at: _Geometry) -> list[tuple[slice, ...]]:
    """For each offset in the kernel, where it meets the padded input over all output positions."""
    return _windows_of(tuple(kernel), tuple(positions), tuple(at.stride), tuple(at.dilation))


@cache
def _windows_of(
    kernel: tuple[int, ...], positions: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[slice, ...]]:
    windows = []
    for offset in itertools.product(*map(range, kernel)):
        starts = [k * step for k, step in zip(offset, dilation, strict=True)]
        axes = zip(starts, stride, positions, strict=True)
        windows.append(tuple(slice(start, start + step * (n - 1) + 1, step) for start, step, n in axes))
    return windows


def _kernel_last(gradient: Tensor) -> Tensor:
    """(*kernel, outputs, inputs) -> (outputs, inputs, *kernel)."""
    axes = gradient.dim() - 2
    return gradient.permute(axes, axes + 1, *range(axes))


def _added_later(product: Tensor, in_order: Callable[[Tensor], Tensor]) -> Deferred:
    """For gradients (units, ...) whose axes are not the weight's: only their sum is brought ``in_order``."""

    def weighted_sum(scales: Scales) -> Tensor:
        rows = at_least_single(scales.kept(product).flatten(1))
        return in_order(torch.mv(rows.t(), scales.factors.to(rows.dtype)).view(product.shape[1:]))

    return Deferred(row_norms(product.flatten(1)).square(), weighted_sum)


def _squared_norms(weight: Tensor, x: Tensor, g: Tensor, at: _Geometry) -> Tensor:
    """||sum_t g_t x_t'||^2 = sum over positions s, t of (x_s . x_t)(g_s . g_t), for each unit.

    What the kernel sees at two positions has the product that its offsets' products add up to.
    """
    columns, rows, positions = x.flatten(2), g.flatten(2), g.shape[2:]
    products = columns.mT @ columns
    if not _is_pointwise(weight, at):
        products = _seen_by_kernel(products.view(-1, *x.shape[2:], *x.shape[2:]), weight.shape[2:], positions, at)
    return (products.view(x.shape[0], rows.shape[2], -1) * (rows.mT @ rows)).sum((1, 2))


def _seen_by_kernel(products: Tensor, kernel: Sequence[int], positions: Sequence[int], at: _Geometry) -> Tensor:
    """From (units, *space, *space) of the input to (units, *positions, *positions) of the output."""
    sides = [side for pad in reversed(at.padding) for side in (pad, pad)]
    products = functional.pad(products, sides * 2)
    seen = products.new_zeros(products.shape[0], *positions, *positions)
    for window in _windows(kernel, positions, at):
        seen += products[(slice(None), *window, *window)]
    return seen


def _weighted_sum(weight: Tensor, x: Tensor, g: Tensor, at: _Geometry, scales: Scales) -> Tensor:
    return _backward(scales.scaled(g), scales.kept(x), weight.detach().to(g.dtype), at, (False, True, False))[1]
