"""What a layer must supply so that its gradient can be had for each unit: the contract of a rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Scales:
    """What each unit's gradient is multiplied by in the clipped sum."""

    factors: Tensor  # (units,)
    dropped: Tensor | None  # (units,) where the factor is 0; None where that is nowhere

    @classmethod
    def of(cls, factors: Tensor) -> Scales:
        """Looks whether units are dropped once for all layers: on a GPU each look waits for it."""
        dropped = factors == 0
        return cls(factors, dropped if bool(dropped.any()) else None)

    def kept(self, values: Tensor) -> Tensor:
        """``values`` (rows, ...) with those of dropped units zeroed, because 0 * NaN is NaN."""
        return values if self.dropped is None else values.masked_fill(_by_row(self.dropped, values), 0)

    def scaled(self, values: Tensor) -> Tensor:
        """Each row of ``values`` (rows, ...) times its unit's factor."""
        return self.kept(values) * _by_row(self.factors.to(values.dtype), values)


@dataclass(frozen=True, slots=True)
class Deferred:
    """A weight gradient known by its norms only; formed once, already clipped and summed, when the factors are known.

    Never instantiating it saves units x parameters numbers ("ghost norm": Goodfellow 2015,
    https://arxiv.org/abs/1510.01799; convolutions: Rochette et al. 2019, https://arxiv.org/abs/1912.06015).
    """

    squared_norms: Tensor  # (units,)
    weighted_sum: Callable[[Scales], Tensor]  # -> sum of factor * gradient; a dropped unit adds exactly 0


UnitGradients = dict[str, Tensor | Deferred]
"""By parameter name: gradients (units, *shape of the parameter), or their deferred form."""


class Rule(Protocol):
    """How one family of layers runs forward and backward with the summed weight gradient left out.

    ``saved`` passes from ``forward`` to ``backward``. A batch holds as many rows of each unit, side by side; a unit's
    gradient must depend on that unit's rows only.
    """

    def prepare(self, module: Any, x: Tensor, /) -> Tensor:
        """Differentiable work before the layer proper (padding); most rules return ``x``."""
        ...

    def forward(self, module: Any, x: Tensor, /) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output, and what to keep for the backward pass."""
        ...

    def backward(
        self, module: Any, saved: tuple[Tensor, ...], g: Tensor, /, *, units: int, wants_input: bool, defer: bool
    ) -> tuple[Tensor | None, UnitGradients]:
        """Given ``g``, the gradient of the output: that of ``x``, and of each trainable parameter for each unit.

        The first may be anything unless ``wants_input``. Without ``defer``, every unit's gradient is instantiated.
        """
        ...


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """The layer's own parameters; ``module.parameters(recurse=False)`` takes ten times as long."""
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def trained(module: nn.Module, name: str) -> bool:
    """Whether ``module`` has a parameter ``name`` that is to be trained."""
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.requires_grad


def at_least_single(values: Tensor) -> Tensor:
    """``values``, half-precision ones as float32: sums of rounded numbers would not be bounded by the clip."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _by_row(of_units: Tensor, values: Tensor) -> Tensor:
    """(units,) -> (rows, 1, ...), to go with ``values`` (rows, ...)."""
    each = values.shape[0] // of_units.shape[0]
    of_rows = of_units if each == 1 else of_units.repeat_interleave(each)
    return of_rows.view(-1, *[1] * (values.dim() - 1))


def by_unit(of_rows: Tensor, units: int) -> Tensor:
    """Sum over each unit's rows: (rows, ...) -> (units, ...)."""
    return of_rows if of_rows.shape[0] == units else of_rows.view(units, -1, *of_rows.shape[1:]).sum(1)


def sum_over_positions(g: Tensor) -> Tensor:
    """(units, channels, *space) -> (units, channels)."""
    return g.flatten(2).sum(2) if g.dim() > 2 else g


def dot_over_positions(x: Tensor, g: Tensor) -> Tensor:
    """Sum over space of ``x * g``: two times (units, channels, *space) -> (units, channels), without a temporary."""
    units, channels = x.shape[:2]
    product = torch.bmm(x.reshape(units * channels, 1, -1), g.reshape(units * channels, -1, 1))
    return product.view(units, channels)
