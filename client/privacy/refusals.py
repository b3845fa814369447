"""What must not be trained privately as it is: each check names the culprit and the way out.

Validators of other libraries let several of these pass: frozen BatchNorm, ``affine=False``, subclasses, shared layers.
Loaders that shuffle or weigh and croppers that multiply samples need no check: training draws its units itself, and
clips all that a unit's transforms make of it as one (:mod:`medfl.client.training.private`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medfl.shared.errors import ConfigError, PolicyRefusal
from medfl.shared.losses import StudyLoss
from medfl.shared.privacy.settings import Engine


def require_private_network(network: nn.Module, example: Tensor, *, engine: Engine = Engine.BOOKKEEPING) -> None:
    """Return when ``network`` can be trained with per-unit gradients.

    Args:
        network: left untouched; a copy is probed.
        example: at least two rows of input-shaped numbers (any values; not patients' images).
        engine: bookkeeping and opacus also need rows that do not influence each other.

    Raises:
        ConfigError: one line for each problem.
    """
    problems = [*_shared_statistics(network)]
    if engine is Engine.OPACUS:
        problems += _registered_twice(network)
    if not problems:  # the probe would only repeat what is known
        problems = [*_probe(copy.deepcopy(network), example, rows_apart=engine is not Engine.LOOP)]
    if problems:
        raise ConfigError("\n".join(problems))


def require_separable_loss(loss: StudyLoss, outputs: Tensor, labels: Tensor) -> None:
    """Return when each row's value of ``loss`` is the one it has alone: no image's gradient then holds another's.

    Args:
        loss: the study's loss.
        outputs: at least two rows of made-up network output.
        labels: as many rows of made-up labels, with different classes in them.

    Raises:
        ConfigError: Dice over the batch, class weights or ``ignore_index`` averaged over the batch, and the like.
    """
    rows = zip(torch.split(outputs, 1), torch.split(labels, 1), strict=True)
    apart = torch.stack([loss(output, label) for output, label in rows])
    together = loss.each(outputs, labels)
    if together.shape != apart.shape or not torch.allclose(together, apart, rtol=1e-4, atol=1e-6):
        raise ConfigError(
            "the loss couples the images of a batch, so one image moves another's gradient: use a loss that is a mean "
            "over images (no Dice over the batch, no class weights or ignored labels averaged over the batch)"
        )


def refuse_unnoised_changes(before: Mapping[str, Tensor], network: nn.Module) -> None:
    """Check, before an update leaves, that training changed nothing but trainable parameters.

    Args:
        before: clones of ``network.state_dict()`` from before training.
        network: the trained network.

    Raises:
        PolicyRefusal: a buffer or frozen parameter changed: it saw images and got no noise.
    """
    noised = {name for name, parameter in network.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    for name, value in network.state_dict().items():
        if name not in noised and not torch.equal(value, before[name]):
            raise PolicyRefusal(
                f"{name} changed in training without noise: the update stays here. Replace the layer that keeps it",
                reason="unnoised state",
            )


def _shared_statistics(network: nn.Module) -> Iterator[str]:
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            yield (
                f"layer {name or type(module).__name__} is a BatchNorm: it mixes patients and keeps statistics of "
                "their images without noise, frozen or not. Use norm: group or instance"
            )
        elif getattr(module, "track_running_stats", False):
            yield (
                f"layer {name or type(module).__name__} keeps statistics of images without noise: "
                "set track_running_stats to false"
            )


def _registered_twice(network: nn.Module) -> Iterator[str]:
    seen: dict[int, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if first != name:
            yield f"parameter {name} is also {first}, and Opacus counts it twice: set privacy.engine to bookkeeping"


def _probe(network: nn.Module, example: Tensor, *, rows_apart: bool) -> Iterator[str]:
    """Problems that only show when the network runs: unused parameters, changing buffers, rows that see each other."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = network(example)
        torch.manual_seed(0)  # the same dropout
        disturbed = network(torch.cat([example[:1], example[1:] * 10 + 1])) if rows_apart else output
    if not isinstance(output, Tensor):
        yield "the network returns several outputs: set privacy.engine to loop" if rows_apart else ""
        return
    if rows_apart and not torch.allclose(output[0], disturbed[0], rtol=1e-3, atol=1e-5):
        yield "the output for one image depends on the other images of the batch: set privacy.engine to loop"
    for name, buffer in network.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            yield f"buffer {name} changes with the images and gets no noise: replace the layer that keeps it"
    output.float().square().sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            yield f"parameter {name} is not used by the network, and would only collect noise: freeze it"
