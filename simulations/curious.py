"""The coordinator as an attacker: from what it sees of one training step it makes the patient's picture again.

Gradient inversion as in Geiping et al. 2020 (https://arxiv.org/abs/2003.14053): a search for the picture whose gradient
points where the seen one does. The attacker is given what it would not have to begin with: the step is over a single
image of each site, and it knows the labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.client.privacy.clipped import UnitData
from medfl.client.workbench import Bench, make_bench
from medfl.shared.errors import ConfigError
from medfl.shared.losses import LossFunction, build_loss
from medfl.shared.privacy.settings import ClientLevel, NoPrivacy
from medfl.shared.study import Study
from medfl.simulations.audit import real_step
from medfl.simulations.config import CuriousServer
from medfl.simulations.inversion import psnr

_RATE, _SMOOTH = 0.1, 1e-4  # of Adam; weight of the total variation


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Peak signal-to-noise ratios in decibels: of the best picture found, and of a plain grey one."""

    found: float
    grey: float


def reconstruct(
    study: Study,
    sites: Mapping[str, SiteData],
    how: CuriousServer,
    *,
    device: torch.device,
    noise_multiplier: float | None = None,
) -> Reconstruction:
    """Attack the first step of ``study`` on one training image of a site, through the study's own protection.

    In clear the coordinator sees that site's gradient. Under secure aggregation it sees one sum over as many sites as
    the study needs at least, and searches for all their images at once. Under differential privacy gradients go through
    the product's own clipping and noise: of ``noise_multiplier`` (as a site planned it), at the client level of what
    the study puts on the sum of all sites.

    Raises:
        ConfigError: no site that trains has the victim's name.
    """
    bench, loss_of = make_bench(study, device), build_loss(study.training.loss)
    names = list(sites)
    victim = names[0] if how.site is None else how.site
    if victim not in sites:
        raise ConfigError(f"curious_server.site {victim}: no site of that name trains")
    others = [name for name in names if name != victim]
    together = study.rounds.minimum_sites if study.secure_aggregation.mode != "none" else 1
    units = [_first(sites[name]) for name in (victim, *others)[:together]]
    if isinstance(study.privacy, ClientLevel):  # a site's plan has what a patient is charged, which is half of it
        noise_multiplier = study.privacy.noise_multiplier
    seen = _seen(study, bench, loss_of, units, noise_multiplier)
    generator = torch.Generator(device).manual_seed(study.seed)
    guess = _search(bench, loss_of, units, seen, how.steps, generator)
    truth = units[0][0]
    return Reconstruction(max(_likeness(one[None], truth) for one in guess), _likeness(truth.mean() + 0 * truth, truth))


def _first(data: SiteData) -> UnitData:
    """A training image (1, channel, *spatial) as network input, and its label."""
    train = data.splits[Split.TRAIN]
    row = torch.zeros(1, dtype=torch.int64, device=train.labels.device)
    return train.inputs(row).clone(), train.labels[:1]


def _seen(
    study: Study, bench: Bench, loss_of: LossFunction, units: Sequence[UnitData], noise_multiplier: float | None
) -> Tensor:
    """The sum of the units' gradients as it reaches the coordinator, of the parameters that travel."""
    network = bench.network.train()
    if isinstance(study.privacy, NoPrivacy) or noise_multiplier is None:
        images, labels = (torch.cat([unit[part] for unit in units]) for part in (0, 1))
        return _flat(torch.autograd.grad(loss_of(network(images), labels), _travelling(bench))).detach()
    released = real_step(network, loss_of, clip_norm=study.privacy.clip_norm)(units, noise_multiplier)
    named = [(name, p.numel()) for name, p in network.named_parameters() if p.requires_grad]
    pieces = torch.split(released, [size for _, size in named])
    travels = {name for name, _ in bench.layout.tensors}
    return torch.cat([piece for (name, _), piece in zip(named, pieces, strict=True) if name in travels]).float()


def _search(
    bench: Bench,
    loss_of: LossFunction,
    units: Sequence[UnitData],
    seen: Tensor,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """One picture for each unit, (unit, channel, *spatial)."""
    labels, parameters = torch.cat([label for _, label in units]), _travelling(bench)
    shape = torch.cat([image for image, _ in units]).shape
    guess = torch.randn(shape, generator=generator, device=labels.device).requires_grad_()
    optimizer = torch.optim.Adam([guess], lr=_RATE)
    fade = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        trial = _flat(torch.autograd.grad(loss_of(bench.network(guess), labels), parameters, create_graph=True))
        mismatch = 1 - nn.functional.cosine_similarity(trial, seen, dim=0) + _SMOOTH * _roughness(guess)
        (guess.grad,) = torch.autograd.grad(mismatch, [guess])
        optimizer.step()
        fade.step()
    return guess.detach()


def _travelling(bench: Bench) -> list[nn.Parameter]:
    names = {name for name, _ in bench.layout.tensors}
    return [p for name, p in bench.network.named_parameters() if p.requires_grad and name in names]


def _roughness(images: Tensor) -> Tensor:
    """Total variation: the mean distance of neighbours."""
    axes = [images.diff(dim=axis).abs().mean() for axis in range(2, images.ndim) if images.shape[axis] > 1]
    return torch.stack(axes).sum()


def _likeness(guess: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in the truth's own range."""
    low, high = truth.amin(), truth.amax()
    width = (high - low).clamp(min=1e-6)
    return psnr((guess - low) / width, (truth - low) / width)


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients])
