"""Adapters: each convolution gets a narrow one beside it, and only those are trained (Hu et al. 2022, "LoRA",
https://arxiv.org/abs/2106.09685; beside convolutions: Rebuffi et al. 2018, https://arxiv.org/abs/1803.10082).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medfl.shared.errors import ConfigError


class AdaptedConv2d(nn.Conv2d):
    """A 2D convolution plus ``up(down(x))``; its own parameters keep their names."""

    down: nn.Conv2d
    up: nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """The sum of both ways."""
        output: Tensor = super().forward(input) + self.up(self.down(input))
        return output


class AdaptedConv3d(nn.Conv3d):
    """A 3D convolution plus ``up(down(x))``."""

    down: nn.Conv3d
    up: nn.Conv3d

    def forward(self, input: Tensor) -> Tensor:
        """The sum of both ways."""
        output: Tensor = super().forward(input) + self.up(self.down(input))
        return output


_KINDS: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Conv2d] | type[nn.Conv3d]]] = {
    nn.Conv2d: (AdaptedConv2d, nn.Conv2d),
    nn.Conv3d: (AdaptedConv3d, nn.Conv3d),
}


def add_adapters(network: nn.Module, rank: int, *, seed: int, skip: frozenset[str] = frozenset()) -> int:
    """Put an adapter of ``rank`` channels beside each convolution of ``network`` that has more, in place.

    ``down`` has the convolution's kernel, ``up`` is pointwise and begins with zeros, so nothing changes at first.
    Convolutions whose weight is named in ``skip`` stay as they are.

    Returns:
        The number of adapters. Their values depend on ``seed`` only.
    """
    chosen = [
        module
        for name, module in network.named_modules()
        if type(module) in _KINDS
        and module.groups == 1
        and min(module.in_channels, module.out_channels) > rank
        and f"{name}.weight" not in skip
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in chosen:
            adapted, plain = _KINDS[type(module)]
            down = plain(
                module.in_channels,
                rank,
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                bias=False,
                padding_mode=module.padding_mode,
            )
            up = plain(rank, module.out_channels, 1, bias=False)
            nn.init.zeros_(up.weight)
            module.__class__ = adapted  # same parameters and settings, another forward
            module.down, module.up = down, up
    return len(chosen)


def adapter_tensors(network: nn.Module) -> frozenset[str]:
    """Names of the adapters' parameters. Raises ConfigError when the network has none."""
    names = [
        f"{name}.{part}.weight"
        for name, module in network.named_modules()
        if isinstance(module, AdaptedConv2d | AdaptedConv3d)
        for part in ("down", "up")
    ]
    if not names:
        raise ConfigError("no convolution is wider than training.adapter_rank: lower it, or use train_only: head")
    return frozenset(names)


def fold_adapters(network: nn.Module) -> None:
    """Add each adapter to its convolution's weight and take it away, in place: the same function, a plain network."""
    for module in network.modules():
        if isinstance(module, AdaptedConv2d | AdaptedConv3d):
            with torch.no_grad():
                up = module.up.weight.flatten(1)  # (outputs, rank)
                module.weight += (up @ module.down.weight.flatten(1)).view_as(module.weight)
            del module.down, module.up
            plain: type[nn.Module] = nn.Conv2d if isinstance(module, AdaptedConv2d) else nn.Conv3d
            module.__class__ = plain  # type: ignore[assignment]
