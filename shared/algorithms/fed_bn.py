"""FedBN, the site's half: which tensors are normalisation and stay (Li et al. 2021, https://arxiv.org/abs/2102.07623)."""

from __future__ import annotations

from torch import nn


def normalisation_tensors(network: nn.Module) -> frozenset[str]:
    """State-dict names of all parameters and buffers that belong to a normalisation layer."""
    kinds = (
        nn.modules.batchnorm._BatchNorm,
        nn.modules.instancenorm._InstanceNorm,
        nn.GroupNorm,
        nn.LayerNorm,
    )
    return frozenset(
        f"{name}.{tensor}" if name else tensor
        for name, module in network.named_modules()
        if isinstance(module, kinds)
        for tensor in module.state_dict()
    )
