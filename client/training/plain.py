"""One round of ordinary local training: batches from resident tensors, one optimizer step each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import isfinite

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from medfl.client.data.augment import augmenter
from medfl.client.data.batches import epoch
from medfl.client.data.tensors import TensorSet
from medfl.client.training.optimizers import build_optimizer
from medfl.shared.algorithms.fed_prox import add_proximal_gradient
from medfl.shared.algorithms.settings import FedProxSettings
from medfl.shared.errors import TrainingError
from medfl.shared.losses import build_loss
from medfl.shared.metrics import EXAMPLES, LOSS
from medfl.shared.study import Study, Training

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
    loss_of, training = build_loss(study.training.loss), study.training
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(study, parameters, round_number)
    adjust = adjust or gradient_rule(study, parameters)
    total = planned_steps(training, len(data.labels))
    losses = torch.zeros((), dtype=torch.float64, device=data.labels.device)
    seen = 0
    network.train()
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with _seeded(seed, data) if _draws(network) else nullcontext():
        for step, (images, labels) in enumerate(_batches(data, study, generator, total)):
            with enough_memory():
                loss = loss_of(network(images), labels)
                optimizer.zero_grad()
                (loss + extra_loss(images) if extra_loss else loss).backward()  # type: ignore[no-untyped-call]
                adjust()
                optimizer.step()
            losses.add_(loss.detach(), alpha=len(labels))
            seen += len(labels)
            if progress is not None:
                progress(step + 1, total)
    if not isfinite(loss_sum := float(losses)):
        raise TrainingError("the training loss is not finite: lower training.learning_rate or look at the intensities")
    return {LOSS: loss_sum, EXAMPLES: float(seen)}


def planned_steps(training: Training, examples: int) -> int:
    """Optimizer steps of one round for a site with ``examples`` training images."""
    if training.steps is not None:
        return training.steps
    return (training.epochs or 1) * -(-examples // training.batch_size)


def gradient_rule(study: Study, parameters: Sequence[nn.Parameter]) -> AdjustGradients:
    """The site's half of the study's strategy; call it before the first step, while the weights are the global ones."""
    match study.strategy:
        case FedProxSettings(mu=mu):
            anchors = [parameter.detach().clone() for parameter in parameters]
            return lambda: add_proximal_gradient(parameters, anchors, mu=mu)
        case _:
            return lambda: None


@contextmanager
def enough_memory() -> Iterator[None]:
    """Raise TrainingError with the way out when the device's memory runs out inside."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise TrainingError("the device has no memory left: lower training.batch_size or free the device") from None


def _batches(
    data: TensorSet, study: Study, generator: torch.Generator, total: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    augment, produced = augmenter(study.data.augmentation), 0
    while produced < total:
        for batch in epoch(data, study.training.batch_size, generator, augment):
            if produced == total:
                return
            yield batch
            produced += 1


def _draws(network: nn.Module) -> bool:
    """Whether a layer of ``network`` draws random numbers."""
    return any(isinstance(layer, _DropoutNd) for layer in network.modules())


@contextmanager
def _seeded(seed: int, data: TensorSet) -> Iterator[None]:
    """Inside, the generators that layers draw from start from ``seed``; afterwards they are as before.

    Not by ``torch.manual_seed``: where CUDA is not in use, each call leaves a stack trace for the day it will be.
    """
    with torch.random.fork_rng(devices=_devices(data)):
        torch.default_generator.manual_seed(seed)
        if data.labels.device.type == "cuda":
            with torch.cuda.device(data.labels.device):
                torch.cuda.manual_seed(seed)
        yield


def _devices(data: TensorSet) -> list[torch.device]:
    return [data.labels.device] if data.labels.device.type == "cuda" else []
