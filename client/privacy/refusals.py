"""What must not be trained privately as it is: each check names the culprit and the way out.

Validators of other libraries let several of these pass: frozen BatchNorm, ``affine=False``, subclasses, shared layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medfl.client.privacy.clipped import LossFunction
from medfl.shared.errors import ConfigError, PolicyRefusal
from medfl.shared.privacy.settings import Engine, Unit


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


def require_separable_loss(loss: LossFunction, outputs: Tensor, labels: Tensor) -> None:
    """Return when ``loss`` over rows is the mean of the rows' losses.

    Args:
        loss: the study's loss.
        outputs: at least two rows of random network output.
        labels: as many rows of random labels, with every class in them.

    Raises:
        ConfigError: ``DiceLoss(batch=True)``, class weights ``ignore_index`` averaged over the batch, and the like.
    """
    rows = zip(torch.split(outputs, 1), torch.split(labels, 1), strict=True)
    apart = torch.stack([loss(output, label) for output, label in rows]).mean()
    if not torch.allclose(loss(outputs, labels), apart, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise ConfigError(
            "the loss couples the images of a batch, so one image moves another's gradient: use a loss that is a mean "
            "over images (no DiceLoss(batch=True), no class weights or ignore_index averaged over the batch)"
        )


def require_one_row_per_image(transform: Any, unit: Unit) -> None:
    """Raise ConfigError when ``transform`` cuts several samples from an image while the image is the unit.

    Each sample would be clipped as a unit of its own: the image's sensitivity would be ``num_samples`` clip norms.
    """
    for part in _transforms_in(transform):
        samples = getattr(part, "num_samples", None) or getattr(getattr(part, "cropper", None), "num_samples", 1)
        if unit is Unit.IMAGE and isinstance(samples, int) and samples > 1:
            raise ConfigError(
                f"{type(part).__name__} cuts {samples} samples from an image, which multiplies its influence: "
                "set num_samples to 1, or use unit: patient, where all of a patient's samples are clipped together"
            )


def require_no_own_sampling(loader: torch.utils.data.DataLoader[Any]) -> None:
    """Raise ConfigError when ``loader`` shuffles, weights or resamples: units are drawn by the private step alone."""
    if not isinstance(loader.sampler, torch.utils.data.SequentialSampler):
        raise ConfigError(
            f"the loader draws images by {type(loader.sampler).__name__}, and the accountant assumes independent "
            "draws with one probability: remove shuffle and sampler; balance classes in the loss"
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


def _transforms_in(transform: Any) -> Iterator[Any]:
    yield transform
    for part in getattr(transform, "transforms", ()):
        yield from _transforms_in(part)
