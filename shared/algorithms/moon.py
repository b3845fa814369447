"""MOON, the site's half: contrast with global and last local model (Li et al. 2021, https://arxiv.org/abs/2103.16257)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity


def contrastive_loss(here: Tensor, anchor: Tensor, last: Tensor, *, temperature: float) -> Tensor:
    """Mean over the batch of equation 3: representations (B, features) near ``anchor``, away from ``last``.

    Where both are equally near, each pair costs ``log 2``.
    """
    near = cosine_similarity(here, anchor, dim=1) / temperature
    away = cosine_similarity(here, last, dim=1) / temperature
    return torch.nn.functional.softplus(away - near).mean()


class Representation:
    """What enters a network's last layer with weights, averaged over space: (B, features).

    The paper's projection head is left out, so that the network stays the study's.
    """

    def __init__(self, network: nn.Module) -> None:
        last = [m for m in network.modules() if next(m.parameters(recurse=False), None) is not None][-1]
        self._seen: Tensor | None = None
        self._hook = last.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen = inputs[0].flatten(2).mean(2) if inputs[0].ndim > 2 else inputs[0]

    def take(self) -> Tensor:
        """The representation of the batch that went through last."""
        assert self._seen is not None  # noqa: S101 - called after a forward pass
        seen, self._seen = self._seen, None
        return seen

    def close(self) -> None:
        """Stop watching."""
        self._hook.remove()
