"""Rules for GroupNorm, InstanceNorm and LayerNorm, and for PReLU: a scale (and shift) for each channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.instancenorm import _InstanceNorm

from medfl.client.privacy.bookkeeping.rule import UnitGradients, dot_over_positions, sum_over_positions, trained

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class GroupNormRule:
    """GroupNorm, and InstanceNorm as a group per channel; see :class:`~medfl.client.privacy.bookkeeping.rule.Rule`."""

    def prepare(self, module: nn.GroupNorm | _InstanceNorm, x: Tensor, /) -> Tensor:
        """Nothing to do."""
        return x

    def forward(self, module: nn.GroupNorm | _InstanceNorm, x: Tensor, /) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Normalise; keep input, group means and inverse standard deviations (units, groups)."""
        x = x.contiguous() if module.weight is None else x.to(module.weight.dtype).contiguous()
        units, channels = x.shape[:2]
        y, mean, inverse = torch.ops.aten.native_group_norm(
            x, module.weight, module.bias, units, channels, x.shape[2:].numel(), _groups(module, channels), module.eps
        )
        return y, (x, mean, inverse)

    def input_gradient(self, module: nn.GroupNorm | _InstanceNorm, saved: tuple[Tensor, ...], g: Tensor, /) -> Tensor:
        """One native call that is asked for nothing else."""
        x, mean, inverse = saved
        units, channels = x.shape[:2]
        found: Tensor = torch.ops.aten.native_group_norm_backward(
            g.contiguous(),
            x,
            mean,
            inverse,
            module.weight,
            units,
            channels,
            x.shape[2:].numel(),
            _groups(module, channels),
            [True, False, False],
        )[0]
        return found

    def unit_gradients(
        self, module: nn.GroupNorm | _InstanceNorm, saved: tuple[Tensor, ...], g: Tensor, /, *, defer: bool
    ) -> UnitGradients:
        """Weight: sum of g * (x - mean) / deviation = (sum of x g - mean * sum of g) / deviation."""
        x, mean, inverse = saved
        units, channels = x.shape[:2]
        found, shift = UnitGradients(), sum_over_positions(g)
        if trained(module, "weight"):
            width = channels // _groups(module, channels)
            mean, inverse = (t.view(units, -1).repeat_interleave(width, 1) for t in (mean, inverse))
            found["weight"] = (dot_over_positions(x, g) - shift * mean) * inverse
        if trained(module, "bias"):
            found["bias"] = shift
        return found


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

    def input_gradient(self, module: nn.LayerNorm, saved: tuple[Tensor, ...], g: Tensor, /) -> Tensor:
        """One native call that is asked for nothing else."""
        x, mean, inverse = saved
        shape = list(module.normalized_shape)
        found: Tensor = torch.ops.aten.native_layer_norm_backward(
            g.contiguous(), x, shape, mean, inverse, module.weight, module.bias, [True, False, False]
        )[0]
        return found

    def unit_gradients(
        self, module: nn.LayerNorm, saved: tuple[Tensor, ...], g: Tensor, /, *, defer: bool
    ) -> UnitGradients:
        """Sums over the positions of a unit."""
        (x, mean, inverse), shape = saved, module.normalized_shape
        found = UnitGradients()
        if trained(module, "weight"):
            found["weight"] = ((x - mean) * inverse * g).reshape(g.shape[0], -1, *shape).sum(1)
        if trained(module, "bias"):
            found["bias"] = g.reshape(g.shape[0], -1, *shape).sum(1)
        return found


class PReLURule:
    """PReLU with one slope, or one a channel; see :class:`~medfl.client.privacy.bookkeeping.rule.Rule`."""

    def prepare(self, module: nn.PReLU, x: Tensor, /) -> Tensor:
        """Nothing to do."""
        return x

    def forward(self, module: nn.PReLU, x: Tensor, /) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Apply; keep the input."""
        return functional.prelu(x, module.weight.to(x.dtype)), (x,)

    def input_gradient(self, module: nn.PReLU, saved: tuple[Tensor, ...], g: Tensor, /) -> Tensor:
        """``g`` where the input was positive, scaled by the slope elsewhere."""
        x = saved[0]
        if module.num_parameters == 1:
            found: Tensor = torch.ops.aten.leaky_relu_backward(g, x, float(module.weight), False)
            return found
        slope = module.weight.to(g.dtype).view(1, -1, *[1] * (x.dim() - 2))
        return torch.where(x > 0, g, g * slope)

    def unit_gradients(
        self, module: nn.PReLU, saved: tuple[Tensor, ...], g: Tensor, /, *, defer: bool
    ) -> UnitGradients:
        """Sum of input times output gradient over the negative inputs of a channel."""
        negative = saved[0].clamp(max=0)
        if module.num_parameters == 1:
            negative, g = negative[:, None], g[:, None]
        return {"weight": dot_over_positions(negative, g)}


def _groups(module: nn.GroupNorm | _InstanceNorm, channels: int) -> int:
    return module.num_groups if isinstance(module, nn.GroupNorm) else channels
