"""Personal layers, the site's half: which tensors stay (Arivazhagan et al. 2019, https://arxiv.org/abs/1912.00818)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from medfl.shared.errors import ConfigError


def layer_tensors(network: nn.Module, layers: Sequence[str]) -> frozenset[str]:
    """State-dict names that begin with one of ``layers``, by whole parts; without ``layers``, the last layer's.

    Raises:
        ConfigError: one of ``layers`` is no part of the network.
    """
    names = [name for name, tensor in network.state_dict().items() if tensor.is_floating_point()]
    chosen = layers or [names[-1].rpartition(".")[0]]
    for layer in chosen:
        if not any(_inside(name, layer) for name in names):
            parts = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in names[-6:]))
            raise ConfigError(f"strategy.layers: the network has no {layer}: its last layers are {parts}")
    return frozenset(name for name in names if any(_inside(name, layer) for layer in chosen))


def _inside(name: str, layer: str) -> bool:
    return name == layer or name.startswith(layer + ".")
