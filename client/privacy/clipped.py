"""The clipped sum of a step's per-unit gradients, and its slow reference: one backward pass for each unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(network output (n, ...), labels (n, ...)) -> scalar mean over the n rows."""

UnitData = tuple[Tensor, Tensor]
"""All rows one unit contributes to a step: images (n, channels, *space) and labels (n, ...)."""

_PIECE = 4096  # values whose norm a float32 accumulator has to 1e-6


@dataclass(frozen=True, slots=True)
class ClippedSum:
    """Sum over units of their gradients, each scaled down to the clip norm. Not yet private: noise is still missing."""

    flat: Tensor  # (values,): every trainable parameter's sum, one after the other
    parameters: list[nn.Parameter]
    norms: Tensor  # (units,) l2 norms before the clip; not finite where the unit was dropped

    @property
    def sums(self) -> list[Tensor]:
        """One for each trainable parameter, in its shape: views of ``flat``."""
        return views_of(self.flat, self.parameters)


def views_of(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Pieces of ``flat`` (values,) in the parameters' shapes, one after the other; they share its memory."""
    pieces = torch.split(flat, [parameter.numel() for parameter in parameters])
    return [piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)]


def empty_sum(parameters: Sequence[nn.Parameter]) -> Tensor:
    """A ``flat`` for these parameters, to be filled."""
    dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
    device = parameters[0].device if parameters else None
    return torch.empty(sum(p.numel() for p in parameters), dtype=dtype, device=device)


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """The parameters to be trained, each once."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def row_norms(rows: Tensor) -> Tensor:
    """l2 norm of each row of ``rows`` (units, values), at least float32; good to 1e-5 however many values there are.

    In pieces, and of the pieces' norms in float64: PyTorch adds up each row's squares on a CPU in few accumulators of
    the row's own type, which is wrong by 1 % for 10 million equal values.
    """
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    units, values = rows.shape
    count = values // _PIECE
    rest: Tensor = torch.linalg.vector_norm(rows[:, count * _PIECE :], dim=1, dtype=wide)
    if count == 0:
        return rest
    pieces = rows[:, : count * _PIECE].reshape(units, count, _PIECE)
    together = torch.cat([torch.linalg.vector_norm(pieces, dim=2, dtype=wide), rest[:, None]], 1)
    norms: Tensor = torch.linalg.vector_norm(together, dim=1, dtype=torch.float64)
    return norms.to(wide)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """l2 norm over all values of all ``tensors``, as good as :func:`row_norms`."""
    small = [tensor for tensor in tensors if tensor.numel() <= _PIECE]
    wide = [row_norms(tensor.reshape(1, -1)) for tensor in tensors if tensor.numel() > _PIECE]
    return torch.nn.utils.get_total_norm([*small, *wide])


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """Scale of each unit's gradient: min(1, clip / norm), and 0 for a norm that is not finite.

    A unit that breaks (NaN in an image, overflow) is dropped whatever the others are, so its removal moves the sum
    by nothing. float32 norms, by :func:`row_norms` or from products, are good to 1e-4, so the clip is set that much
    lower and the bound holds exactly.
    """
    slack = 1e-4 if norms.dtype == torch.float32 else 1e-12
    factors = (clip_norm * (1 - slack) / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    return torch.where(norms.isfinite(), factors, torch.zeros_like(factors))


def clipped_sum_by_loop(
    network: nn.Module, loss: LossFunction, units: Sequence[UnitData], clip_norm: float
) -> ClippedSum:
    """One gradient of each unit's mean loss, clipped once. Works with every network that trains on one unit alone."""
    parameters = trainable(network)
    flat = empty_sum(parameters).zero_()
    sums, norms = views_of(flat, parameters), []
    for images, labels in units:
        gradients = list(
            torch.autograd.grad(loss(network(images), labels), parameters, allow_unused=True, materialize_grads=True)
        )
        norm = total_norm(gradients)
        factor = float(clip_factors(norm, clip_norm))
        if factor > 0:  # adding 0 * NaN would poison the sum
            torch._foreach_add_(sums, gradients, alpha=factor)
        norms.append(norm)
    return ClippedSum(flat, parameters, torch.stack(norms) if norms else flat.new_zeros(0))
