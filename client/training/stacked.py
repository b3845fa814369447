"""Several sites' rounds as one computation: their models stacked along a new first axis, one step for all of them.

For models so small that calling PyTorch costs more than its arithmetic. Batched as PyTorch's model ensembles are
(https://docs.pytorch.org/tutorials/intermediate/ensembling.html): each site's numbers are what its own training gives,
up to rounding. (Adam makes steps of full size of gradients that are nothing but rounding, as those of a bias before
instance norm are: there such weights differ.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from medfl.client.data.tensors import TensorSet
from medfl.client.training.local import Given, Local
from medfl.client.training.optimizers import build_optimizer
from medfl.client.training.plain import batches, draws, gradient_rule, planned_steps
from medfl.client.workbench import Bench
from medfl.shared.algorithms.settings import AdaptiveSettings, FedAvgMSettings, FedAvgSettings, FedProxSettings
from medfl.shared.losses import build_loss
from medfl.shared.metrics import EXAMPLES, LOSS
from medfl.shared.privacy.settings import NoPrivacy
from medfl.shared.study import Study
from medfl.shared.weights import joined


def can_stack(study: Study, network: nn.Module) -> bool:
    """Whether sites of ``study`` may train as one: nothing stays at a site, no layer has buffers or draws numbers."""
    plain = isinstance(study.strategy, FedAvgSettings | FedProxSettings | FedAvgMSettings | AdaptiveSettings)
    whole = study.training.train_only == "all"
    return (
        plain
        and whole
        and isinstance(study.privacy, NoPrivacy)
        and not draws(network)
        and next(network.buffers(), None) is None
    )


def same_shapes(one: TensorSet, other: TensorSet) -> bool:
    """Whether both have as many examples, of the same shape and kind."""
    return (one.images.shape, one.images.dtype, one.labels.shape) == (
        other.images.shape,
        other.images.dtype,
        other.labels.shape,
    )


def train_stacked(
    bench: Bench,
    sets: Sequence[TensorSet],
    study: Study,
    given: Given,
    *,
    generators: Sequence[torch.Generator],
    round_number: int,
) -> list[Local]:
    """Train each of ``sets``, which have the :func:`same_shapes`, for one round from ``given.weights``.

    The network itself is not changed. A result may hold values that are not finite: see :func:`checked`.
    """
    network, losses_of, count = bench.network, build_loss(study.training.loss).each, len(sets)
    bench.load(given.weights, None)
    network.train()
    stacked = {
        name: parameter.detach().expand(count, *parameter.shape).clone().requires_grad_(parameter.requires_grad)
        for name, parameter in network.named_parameters()
    }

    def output(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        result: Tensor = functional_call(network, parameters, (images,))
        return result

    trained = [parameter for parameter in stacked.values() if parameter.requires_grad]
    optimizer, adjust = build_optimizer(study, trained, round_number), gradient_rule(study, trained)
    outputs_of = torch.vmap(output)
    steps = planned_steps(study.training, len(sets[0]))
    sums = torch.zeros(count, dtype=torch.float64, device=sets[0].labels.device)
    seen = 0
    sources = [batches(data, study, generator, steps) for data, generator in zip(sets, generators, strict=True)]
    for of_sites in zip(*sources, strict=True):
        images, labels = (torch.stack([batch[part] for batch in of_sites]) for part in (0, 1))
        # No loss sees two examples: PyTorch's batched ones would be slower, and MONAI's Dice cannot be batched.
        losses = losses_of(outputs_of(stacked, images).flatten(0, 1), labels.flatten(0, 1)).view(count, -1).mean(1)
        optimizer.zero_grad()
        torch.autograd.backward(losses.sum())
        adjust()
        optimizer.step()
        sums.add_(losses.detach(), alpha=images.shape[1])
        seen += images.shape[1]
    tallies = [{LOSS: total, EXAMPLES: float(seen)} for total in sums.tolist()]
    order = [name for name, _ in bench.layout.tensors]
    rows = torch.cat([stacked[name].detach().reshape(count, -1) for name in order], 1)
    updates = joined([rows]).reshape(count, -1) - given.weights
    return [Local(np.ascontiguousarray(update), None, tally) for update, tally in zip(updates, tallies, strict=True)]
