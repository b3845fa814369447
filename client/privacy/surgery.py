"""Make a network ready for private training where that changes nothing but what privacy needs, and say what changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

GROUPS = 8


def make_private_ready(network: nn.Module, example: Tensor | None = None) -> list[str]:
    """Change ``network`` in place; return one sentence for each kind of change, none when it was ready.

    * every BatchNorm, also frozen or without weights, becomes GroupNorm with gcd(8, channels) groups and keeps its
      scale and shift;
    * InstanceNorm stops to keep running statistics;
    * in-place activations and MONAI's in-place residual sums become ordinary ones (hooks cannot see through them);
    * with an ``example`` input, parameters the network does not use are frozen: they would only collect noise.
    """
    changes = [
        _count(_replace_batch_norms(network), "BatchNorm layer", f"became GroupNorm of up to {GROUPS} groups"),
        _count(_stop_statistics(network), "InstanceNorm layer", "no longer keeps running statistics"),
        _count(_stop_inplace(network), "activation", "no longer works in place"),
        _count(_rewrite_residuals(network), "residual block", "adds its shortcut out of place"),
    ]
    if example is not None:
        frozen = _freeze_unused(network, example)
        changes.append(_count(len(frozen), "unused parameter", f"was frozen: {', '.join(frozen)}"))
    return [change for change in changes if change]


def _count(number: int, what: str, became: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}: each {became}" if number else ""


def _replace_batch_norms(module: nn.Module) -> int:
    replaced = 0
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, _as_group_norm(child))
            replaced += 1
        else:
            replaced += _replace_batch_norms(child)
    return replaced


def _as_group_norm(norm: _BatchNorm) -> nn.GroupNorm:
    channels = norm.num_features
    group = nn.GroupNorm(math.gcd(GROUPS, channels), channels, eps=norm.eps, affine=norm.affine)
    if norm.affine:
        group.load_state_dict({"weight": norm.weight.detach(), "bias": norm.bias.detach()})
        group.to(norm.weight.device, norm.weight.dtype)
    return group.train(norm.training)


def _stop_statistics(network: nn.Module) -> int:
    norms = [m for m in network.modules() if isinstance(m, nn.modules.instancenorm._InstanceNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return len(norms)


def _stop_inplace(network: nn.Module) -> int:
    working = [module for module in network.modules() if getattr(module, "inplace", False) is True]
    for module in working:
        module.inplace = False  # type: ignore[assignment]
    return len(working)


def _rewrite_residuals(network: nn.Module) -> int:
    from monai.networks.blocks.dynunet_block import UnetResBlock
    from monai.networks.blocks.segresnet_block import ResBlock
    from monai.networks.nets.resnet import ResNetBlock, ResNetBottleneck

    out_of_place: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
        ResBlock: _res_block,
        UnetResBlock: _unet_res_block,
        ResNetBlock: _resnet_block,
        ResNetBottleneck: _resnet_bottleneck,
    }
    blocks = [module for module in network.modules() if type(module) in out_of_place and "forward" not in vars(module)]
    for block in blocks:
        block.forward = MethodType(out_of_place[type(block)], block)
    return len(blocks)


def _freeze_unused(network: nn.Module, example: Tensor) -> list[str]:
    probe = copy.deepcopy(network).eval()
    output = probe(example)
    for part in output if isinstance(output, list | tuple) else [output]:
        part.float().square().sum().backward(retain_graph=True)
    unused = [name for name, p in probe.named_parameters() if p.requires_grad and p.grad is None]
    for name in unused:
        network.get_parameter(name).requires_grad_(False)
    return unused


def _res_block(self: Any, x: Tensor) -> Tensor:
    y = self.conv1(self.act(self.norm1(x)))
    y = self.conv2(self.act(self.norm2(y)))
    return torch.add(y, x)


def _unet_res_block(self: Any, inp: Tensor) -> Tensor:
    residual = inp
    out = self.lrelu(self.norm1(self.conv1(inp)))
    out = self.norm2(self.conv2(out))
    if hasattr(self, "conv3"):
        residual = self.conv3(residual)
    if hasattr(self, "norm3"):
        residual = self.norm3(residual)
    activated: Tensor = self.lrelu(out + residual)
    return activated


def _resnet_block(self: Any, x: Tensor) -> Tensor:
    out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
    activated: Tensor = self.act(out + (x if self.downsample is None else self.downsample(x)))
    return activated


def _resnet_bottleneck(self: Any, x: Tensor) -> Tensor:
    out = self.act(self.bn1(self.conv1(x)))
    out = self.act(self.bn2(self.conv2(out)))
    out = self.bn3(self.conv3(out))
    activated: Tensor = self.act(out + (x if self.downsample is None else self.downsample(x)))
    return activated
