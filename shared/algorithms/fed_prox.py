"""FedProx, the site's half: a pull back to the round's global model (Li et al. 2020, https://arxiv.org/abs/1812.06127)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def add_proximal_gradient(parameters: Sequence[torch.Tensor], anchors: Sequence[torch.Tensor], *, mu: float) -> None:
    """Add ``mu * (w - w_global)`` to each parameter's gradient, the gradient of ``mu / 2 * |w - w_global|^2``.

    Added to the gradient and not to the loss, so that under differential privacy it comes after clipping and noise
    (it depends on no image). Parameters without a gradient are left alone.
    """
    with torch.no_grad():
        for parameter, anchor in zip(parameters, anchors, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - anchor, alpha=mu)
