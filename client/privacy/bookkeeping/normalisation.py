"""Rules for GroupNorm, InstanceNorm and LayerNorm, and for PReLU: a scale (and shift) for each channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.instancenorm import _InstanceNorm

from medfl.client.privacy.bookkeeping.rule import UnitGradients, by_unit, dot_over_positions, trained

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class GroupNormRule:
    """GroupNorm, and InstanceNorm as a group per channel; see :class:`~medfl.client.privacy.bookkeeping.rule.Rule`."""

    def prepare(self, module: nn.GroupNorm | _InstanceNorm, x: Tensor, /) -> Tensor:
        """Nothing to do."""
        return x

    def forward(self, module: nn.GroupNorm | _InstanceNorm, x: Tensor, /) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Normalise; keep input, group means and inverse standard deviations (rows, groups)."""
        x = x.contiguous() if module.weight is None else x.to(module.weight.dtype).contiguous()
        rows, channels = x.shape[:2]
        y, mean, inverse = torch.ops.aten.native_group_norm(
            x, module.weight, module.bias, rows, channels, x.shape[2:].numel(), _groups(module, channels), module.eps
        )
        return y, (x, mean, inverse)

    def backward(
        self,
        module: nn.GroupNorm | _InstanceNorm,
        saved: tuple[Tensor, ...],
        g: Tensor,
        /,
        *,
        units: int,
        wants_input: bool,
        defer: bool,
    ) -> tuple[Tensor, UnitGradients]:
        """One native call for everything: rows that stand side by side as groups of one row are not summed over."""
        x, mean, inverse = saved
        rows, channels = x.shape[:2]
        weight = None if module.weight is None else module.weight.detach().repeat(rows)
        towards, scale, shift = torch.ops.aten.native_group_norm_backward(
            g.contiguous().view(1, rows * channels, -1),
            x.view(1, rows * channels, -1),
            mean.view(1, -1),
            inverse.view(1, -1),
            weight,
            1,
            rows * channels,
            x.shape[2:].numel(),
            rows * _groups(module, channels),
            [wants_input, trained(module, "weight"), trained(module, "bias")],
        )
        found: UnitGradients = {}
        if trained(module, "weight"):
            found["weight"] = by_unit(scale.view(rows, channels), units)
        if trained(module, "bias"):
            found["bias"] = by_unit(shift.view(rows, channels), units)
        return towards.view_as(x) if wants_input else towards, found


class LayerNormRule:
    """LayerNorm over the last axes; see :class:`~medfl.client.privacy.bookkeeping.rule.Rule`."""

    def prepare(self, module: nn.LayerNorm, x: Tensor, /) -> Tensor:
        """Nothing to do."""
        return x

    def forward(self, module: nn.LayerNorm, x: Tensor, /) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Normalise; keep input, means and inverse standard deviations."""
        x = x.to(module.weight.dtype)
        shape = list(module.normalized_shape)
        y, mean, inverse = torch.ops.aten.native_layer_norm(x, shape, module.weight, module.bias, module.eps)
        return y, (x, mean, inverse)

    def backward(
        self,
        module: nn.LayerNorm,
        saved: tuple[Tensor, ...],
        g: Tensor,
        /,
        *,
        units: int,
        wants_input: bool,
        defer: bool,
    ) -> tuple[Tensor, UnitGradients]:
        """Input: one native call that is asked for nothing else. Parameters: sums over the positions of a unit."""
        x, mean, inverse = saved
        shape = list(module.normalized_shape)
        towards: Tensor = torch.ops.aten.native_layer_norm_backward(
            g.contiguous(), x, shape, mean, inverse, module.weight, module.bias, [wants_input, False, False]
        )[0]
        found = UnitGradients()
        if trained(module, "weight"):
            found["weight"] = ((x - mean) * inverse * g).reshape(units, -1, *shape).sum(1)
        if trained(module, "bias"):
            found["bias"] = g.reshape(units, -1, *shape).sum(1)
        return towards, found


class PReLURule:
    """PReLU with one slope, or one a channel; see :class:`~medfl.client.privacy.bookkeeping.rule.Rule`."""

    def prepare(self, module: nn.PReLU, x: Tensor, /) -> Tensor:
        """Nothing to do."""
        return x

    def forward(self, module: nn.PReLU, x: Tensor, /) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Apply; keep the input."""
        return functional.prelu(x, module.weight.to(x.dtype)), (x,)

    def backward(
        self, module: nn.PReLU, saved: tuple[Tensor, ...], g: Tensor, /, *, units: int, wants_input: bool, defer: bool
    ) -> tuple[Tensor | None, UnitGradients]:
        """Input: ``g``, times the slope where it was negative. Slope: sum of input times ``g`` over those places."""
        x = saved[0]
        negative, shared = x.clamp(max=0), module.num_parameters == 1
        rows = dot_over_positions(negative[:, None], g[:, None]) if shared else dot_over_positions(negative, g)
        found: UnitGradients = {"weight": by_unit(rows, units)}
        if not wants_input:
            return None, found
        if shared and x.device.type == "cpu":  # in half the time; on a GPU, to look at the slope would wait for it
            return torch.ops.aten.leaky_relu_backward(g, x, float(module.weight), False), found
        slope = module.weight.to(g.dtype).view(1, -1, *[1] * (x.dim() - 2))
        return torch.where(x > 0, g, g * slope), found


def _groups(module: nn.GroupNorm | _InstanceNorm, channels: int) -> int:
    return module.num_groups if isinstance(module, nn.GroupNorm) else channels
