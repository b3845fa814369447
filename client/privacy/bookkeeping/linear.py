"""Rules for Linear and Embedding."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfl.client.privacy.bookkeeping.rule import (
    Deferred,
    Scales,
    UnitGradients,
    at_least_single,
    trained,
)


class LinearRule:
    """Linear over the last axis of (units, ..., features); see :class:`~medfl.client.privacy.bookkeeping.rule.Rule`."""

    def prepare(self, module: nn.Linear, x: Tensor, /) -> Tensor:
        """Nothing to do."""
        return x

    def forward(self, module: nn.Linear, x: Tensor, /) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Multiply; keep the input."""
        return functional.linear(x, module.weight, module.bias), (x,)

    def backward(
        self, module: nn.Linear, saved: tuple[Tensor, ...], g: Tensor, /, *, units: int, wants_input: bool, defer: bool
    ) -> tuple[Tensor | None, UnitGradients]:
        """With one position a unit's gradient is an outer product, whose norm is the product of two norms."""
        found = UnitGradients()
        towards = g @ module.weight.to(g.dtype) if wants_input else None
        g = g.reshape(units, -1, g.shape[-1])
        x = saved[0].reshape(units, -1, saved[0].shape[-1])
        if trained(module, "bias"):
            found["bias"] = g.sum(1)
        if trained(module, "weight"):
            positions = g.shape[1]
            if defer:
                x, g = at_least_single(x), at_least_single(g)
            if defer and positions == 1:
                squared = x.square().sum((1, 2)) * g.square().sum((1, 2))
                found["weight"] = Deferred(squared, partial(_weighted_sum, x, g))
            elif defer and 2 * positions**2 < module.weight.numel():
                squared = torch.einsum("uij,uij->u", x @ x.mT, g @ g.mT)
                found["weight"] = Deferred(squared, partial(_weighted_sum, x, g))
            else:
                found["weight"] = g.mT @ x
        return towards, found


class EmbeddingRule:
    """Embedding of integer codes (units, ...); see :class:`~medfl.client.privacy.bookkeeping.rule.Rule`."""

    def prepare(self, module: nn.Embedding, x: Tensor, /) -> Tensor:
        """Nothing to do."""
        return x

    def forward(self, module: nn.Embedding, x: Tensor, /) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Look up; keep the codes."""
        return functional.embedding(x, module.weight), (x,)

    def backward(
        self,
        module: nn.Embedding,
        saved: tuple[Tensor, ...],
        g: Tensor,
        /,
        *,
        units: int,
        wants_input: bool,
        defer: bool,
    ) -> tuple[None, UnitGradients]:
        """Codes have no gradient. Each row of the table gets the sum of the output gradients where it was looked up."""
        width = g.shape[-1]
        codes = saved[0].reshape(units, -1, 1).expand(-1, -1, width)
        table = g.new_zeros(units, *module.weight.shape).scatter_add_(1, codes, g.reshape(units, -1, width))
        if module.padding_idx is not None:
            table[:, module.padding_idx] = 0
        return None, {"weight": table}


def _weighted_sum(x: Tensor, g: Tensor, scales: Scales) -> Tensor:
    """From ``x`` (units, positions, inputs) and ``g`` (units, positions, outputs): (outputs, inputs)."""
    return scales.scaled(g).flatten(0, 1).mT @ scales.kept(x).flatten(0, 1)
