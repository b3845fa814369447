"""One round of ordinary local training: batches from resident tensors, one optimizer step each."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import isfinite
from operator import mul
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from medfl.client.data.augment import augmenter
from medfl.client.data.batches import epoch
from medfl.client.data.tensors import TensorSet
from medfl.client.training.optimizers import build_optimizer
from medfl.client.trouble import free_memory, in_words, out_of_memory
from medfl.shared.algorithms.fed_prox import add_proximal_gradient
from medfl.shared.algorithms.settings import FedProxSettings
from medfl.shared.errors import TrainingError
from medfl.shared.losses import LossFunction, build_loss
from medfl.shared.metrics import EXAMPLES, LOSS
from medfl.shared.study import Study, Training

log = logging.getLogger("medfl.site")

AdjustGradients = Callable[[], None]
"""Called between backward and optimizer step: a strategy's site half adds its own term to the gradients."""

ExtraLoss = Callable[[torch.Tensor], torch.Tensor]
"""Called after the forward pass with the batch's images: a further term of the loss."""


def train_plain(
    network: nn.Module,
    data: TensorSet,
    study: Study,
    *,
    generator: torch.Generator,
    round_number: int = 1,
    progress: Callable[[int, int], None] | None = None,
    adjust: AdjustGradients | None = None,
    extra_loss: ExtraLoss | None = None,
) -> dict[str, float]:
    """Train ``network`` in place for one round of ``study``; order, augmentation and dropout come from ``generator``.

    ``adjust`` replaces the study's own gradient rule; ``extra_loss`` is added to the loss, and not to its tally.

    Returns:
        The tally of the training losses: their sum over examples, and the number of examples seen.

    Raises:
        TrainingError: a loss or a weight is not finite, or the device has no memory left.
    """
    loss_of, training = build_loss(study.training.loss).mean, study.training
    nature = _nature(network)
    parameters = [parameter for parameter in nature.parameters if parameter.requires_grad]
    optimizer = build_optimizer(study, parameters, round_number)
    adjust = adjust or gradient_rule(study, parameters)
    total = planned_steps(training, len(data))
    losses, sizes = [], []
    if not network.training:
        network.train()
    backward, pieces = partial(_backward, network, loss_of, extra_loss), 1
    with _seeded(generator, data) if nature.draws else nullcontext():
        for step, (images, labels) in enumerate(batches(data, study, generator, total)):
            optimizer.zero_grad()
            size = labels.shape[0]
            loss, pieces = _within_memory(backward, images, labels, pieces, limit=size if nature.divisible else 1)
            adjust()
            optimizer.step()
            losses.append(loss)
            sizes.append(size)
            if progress is not None:
                progress(step + 1, total)
    loss_sum = sum(map(mul, torch.stack(losses).tolist(), sizes)) if losses else 0.0  # one look at the device a round
    if not isfinite(loss_sum):
        raise TrainingError("the training loss is not finite: lower training.learning_rate or look at the intensities")
    return {LOSS: loss_sum, EXAMPLES: float(sum(sizes))}


def round_generator(study: Study, site: str, round_number: int, device: torch.device) -> torch.Generator:
    """Randomness of one site's round: the same at every repetition, different from every other site and round."""
    seed = hashlib.sha256(f"{study.seed}/{site}/{round_number}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(seed[:8], "little") >> 1)


def planned_steps(training: Training, examples: int) -> int:
    """Optimizer steps of one round for a site with ``examples`` training images."""
    if training.steps is not None:
        return training.steps
    return (training.epochs or 1) * -(-examples // training.batch_size)


def gradient_rule(study: Study, parameters: Sequence[torch.Tensor]) -> AdjustGradients:
    """The site's half of the study's strategy; call it before the first step, while the weights are the global ones."""
    match study.strategy:
        case FedProxSettings(mu=mu):
            anchors = [parameter.detach().clone() for parameter in parameters]
            return lambda: add_proximal_gradient(parameters, anchors, mu=mu)
        case _:
            return lambda: None


def _backward(
    network: nn.Module,
    loss_of: LossFunction,
    extra_loss: ExtraLoss | None,
    images: torch.Tensor,
    labels: torch.Tensor,
    pieces: int,
) -> torch.Tensor:
    """Write the batch's gradient into ``p.grad``, its images in ``pieces``, one after the other; returns its loss.

    The loss is a mean over images that do not see each other, so that the gradient is the same but for rounding.
    """
    if pieces == 1:
        loss = loss_of(network(images), labels)
        torch.autograd.backward(loss + extra_loss(images) if extra_loss else loss)
        return loss.detach()
    network.zero_grad(set_to_none=True)  # of the attempt that ran out of memory
    total = torch.zeros((), device=labels.device)
    for some, theirs in zip(images.tensor_split(pieces), labels.tensor_split(pieces), strict=True):
        share = len(theirs) / len(labels)
        loss = loss_of(network(some), theirs)
        torch.autograd.backward((loss + extra_loss(some) if extra_loss else loss) * share)
        total += loss.detach() * share
    return total


def _within_memory(
    backward: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    pieces: int,
    *,
    limit: int,
) -> tuple[torch.Tensor, int]:
    """What ``backward(images, labels, pieces)`` returns, and how many pieces it took: twice as many each time memory
    runs out.

    Raises:
        TrainingError: memory runs out with ``limit`` pieces, too.
    """
    while True:
        try:
            return backward(images, labels, min(pieces, limit)), pieces
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if pieces >= limit:
                raise in_words(error) or error from None
        free_memory()  # not above: the exception holds the tensors of the failed attempt
        pieces *= 2
        log.warning("memory ran out: batches are computed in %d pieces", pieces)


@dataclass(frozen=True, slots=True)
class _Nature:
    """What training asks of a network."""

    parameters: list[nn.Parameter]  # no module: what refers to the network would keep it
    draws: bool
    divisible: bool
    """Whether the images of a batch do not see each other."""


_natures: WeakKeyDictionary[nn.Module, _Nature] = WeakKeyDictionary()


def _nature(network: nn.Module) -> _Nature:
    """Looked up once for each network: to walk through a small one at each round costs as much as a step."""
    if (known := _natures.get(network)) is None:
        divisible = not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules())
        known = _natures[network] = _Nature(list(network.parameters()), draws(network), divisible)
    return known


def batches(
    data: TensorSet, study: Study, generator: torch.Generator, total: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """``total`` batches of a round, in the order and with the changes that ``generator`` draws."""
    augment, produced = augmenter(study.data.augmentation), 0
    while produced < total:
        for batch in epoch(data, study.training.batch_size, generator, augment):
            if produced == total:
                return
            yield batch
            produced += 1


def draws(network: nn.Module) -> bool:
    """Whether a layer of ``network`` draws random numbers."""
    return any(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in network.modules())


@contextmanager
def _seeded(generator: torch.Generator, data: TensorSet) -> Iterator[None]:
    """Inside, the generators that layers draw from start from a draw of ``generator``; afterwards they are as before.

    Not by ``torch.manual_seed``: where CUDA is not in use, each call leaves a stack trace for the day it will be.
    """
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=_devices(data)):
        torch.default_generator.manual_seed(seed)
        if data.labels.device.type == "cuda":
            with torch.cuda.device(data.labels.device):
                torch.cuda.manual_seed(seed)
        yield


def _devices(data: TensorSet) -> list[torch.device]:
    return [data.labels.device] if data.labels.device.type == "cuda" else []
