"""The clipped sum by Opacus' per-sample gradient hooks (Yousefpour et al. 2021, https://arxiv.org/abs/2109.12298)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medfl.client.privacy.bookkeeping.rule import Scales
from medfl.client.privacy.clipped import (
    ClippedSum,
    LossFunction,
    UnitData,
    clip_factors,
    empty_sum,
    row_norms,
    trainable,
    views_of,
)
from medfl.shared.errors import ConfigError


def clipped_sum_by_opacus(
    network: nn.Module, loss: LossFunction, units: Sequence[UnitData], clip_norm: float
) -> ClippedSum:
    """Like :func:`~medfl.client.privacy.clipped.clipped_sum_by_loop` for units of one row and equal shapes.

    Raises:
        ConfigError: Opacus is not installed, or the network registers a layer twice, which Opacus would count twice.
    """
    try:
        from opacus.grad_sample import GradSampleModule
    except ImportError:
        raise ConfigError(
            "privacy.engine opacus needs the package opacus: pip install opacus, or set bookkeeping"
        ) from None
    owners = [id(p) for m in _registered(network) for p in m.parameters(recurse=False) if p.requires_grad]
    if len(owners) != len(set(owners)):
        raise ConfigError("Opacus counts layers that are registered twice doubly: set privacy.engine to bookkeeping")
    parameters = trainable(network)
    wrapped = GradSampleModule(network, loss_reduction="sum")
    try:
        outputs = wrapped(torch.cat([images for images, _ in units]))
        rows = zip(torch.split(outputs, 1), (labels for _, labels in units), strict=True)
        torch.stack([loss(output, labels) for output, labels in rows]).sum().backward()  # type: ignore[no-untyped-call]
        found = [_per_unit(parameter, len(units)) for parameter in parameters]
    finally:
        for parameter in parameters:
            parameter.grad = None
        wrapped.to_standard_module()
    norms = torch.stack([row_norms(g.reshape(len(units), -1)) for g in found]).norm(dim=0)
    scales = Scales.of(clip_factors(norms, clip_norm))
    flat = empty_sum(parameters)
    for total, gradients in zip(views_of(flat, parameters), found, strict=True):
        total.copy_(torch.einsum("u,u...->...", scales.factors, scales.kept(gradients)))
    return ClippedSum(flat, parameters, norms)


def _registered(network: nn.Module) -> list[nn.Module]:
    return [module for _, module in network.named_modules(remove_duplicate=False)]


def _per_unit(parameter: nn.Parameter, units: int) -> Tensor:
    """Gradients (units, *shape); zeros for a parameter the network did not use."""
    found = getattr(parameter, "grad_sample", None)
    if found is None:
        return parameter.new_zeros(units, *parameter.shape)
    return sum(found) if isinstance(found, list) else found  # type: ignore[return-value]
