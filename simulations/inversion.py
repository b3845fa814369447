"""Gradient inversion: the picture of one patient, made again from what one training step gives away.

Two attacks by someone who knows the weights: division in a first linear layer (Phong et al. 2018,
https://eprint.iacr.org/2017/715), exact; and search for a picture with the same gradient (Zhu et al. 2019,
https://arxiv.org/abs/1906.08935).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medfl.simulations.audit import Step, real_step

SIDE = 16
RECOGNISABLE_DB = 30.0
"""A reconstruction of this peak signal-to-noise ratio or more shows the patient's picture; 8-bit JPEG has about 35."""

Gradients = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(network, picture (1, 1, SIDE, SIDE), label (1,)) -> the flat gradient as it is released."""


@dataclass(frozen=True, slots=True)
class Inversion:
    """Peak signal-to-noise ratios in decibels: of both attacks, and of a grey picture for comparison."""

    division: float
    search: float
    grey: float


def attack_gradients(release: Gradients, *, seed: int = 0, restarts: int = 2) -> Inversion:
    """Let ``release`` give away one step on one made-up picture, and reconstruct it."""
    picture, label = made_up_picture(seed), torch.tensor([1])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        linear = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 2))
        smooth = nn.Sequential(
            nn.Conv2d(1, 8, 5, padding=2, stride=2), nn.Sigmoid(), nn.Conv2d(8, 8, 5, padding=2), nn.Sigmoid(),
            nn.Flatten(), nn.Linear(8 * (SIDE // 2) ** 2, 2),
        )  # fmt: skip
        for parameter in smooth.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
        divided = _divide(linear, release(linear, picture, label))
        found = _search(smooth, release(smooth, picture, label), label, restarts)
    return Inversion(psnr(divided, picture), psnr(found, picture), psnr(torch.full_like(picture, 0.5), picture))


def unprotected(network: nn.Module, picture: Tensor, label: Tensor) -> Tensor:
    """The bare gradient, as federated averaging of one step gives it away."""
    loss = nn.functional.cross_entropy(network(picture), label)
    return _flat(torch.autograd.grad(loss, list(network.parameters())))


def protected(noise_multiplier: float, *, clip_norm: float = 1.0) -> Gradients:
    """What the product's private step releases; noise of almost 0 shows what clipping alone is worth."""

    def release(network: nn.Module, picture: Tensor, label: Tensor) -> Tensor:
        step: Step = real_step(network, nn.functional.cross_entropy, clip_norm=clip_norm)
        return step([(picture, label)], noise_multiplier).float()

    return release


def made_up_picture(seed: int) -> Tensor:
    """Soft spots on a slope, between 0 and 1."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    picture = 0.3 * rows / SIDE
    for top, left, width in (torch.rand((4, 3), generator=draw) * torch.tensor([SIDE, SIDE, 2.0])).tolist():
        picture = picture + torch.exp(-((rows - top) ** 2 + (columns - left) ** 2) / (2 * (1 + width) ** 2))
    return (picture / picture.max())[None, None]


def psnr(guess: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels of pictures with values between 0 and 1; at most 120.

    >>> round(psnr(torch.full((4,), 0.6), torch.full((4,), 0.5)), 3)
    20.0
    """
    error = float((guess.clamp(0, 1) - truth).square().mean())
    return min(120.0, -10 * math.log10(max(error, 1e-12)))


def _divide(network: nn.Module, gradient: Tensor) -> Tensor:
    """The picture by the chain rule: d loss / d W = (d loss / d b) times the picture, for each output."""
    pixels = SIDE * SIDE
    weights, biases = gradient[: 2 * pixels].view(2, pixels), gradient[2 * pixels :]
    strongest = int(biases.abs().argmax())
    picture: Tensor = (weights[strongest] / biases[strongest]).view(1, 1, SIDE, SIDE).nan_to_num(0.5)
    return picture


def _search(network: nn.Module, gradient: Tensor, label: Tensor, restarts: int) -> Tensor:
    """The picture whose gradient points where ``gradient`` does (clipping changes its length), the best of a few."""
    parameters, target = list(network.parameters()), gradient / gradient.norm()
    best, found = math.inf, torch.full((1, 1, SIDE, SIDE), 0.5)
    for _ in range(restarts):
        guess = torch.rand(1, 1, SIDE, SIDE).requires_grad_()
        optimizer = torch.optim.LBFGS([guess], max_iter=200, history_size=50, line_search_fn="strong_wolfe")

        def mismatch(guess: Tensor = guess) -> Tensor:
            loss = nn.functional.cross_entropy(network(guess), label)
            trial = _flat(torch.autograd.grad(loss, parameters, create_graph=True))
            distance: Tensor = (trial / trial.norm() - target).square().sum()
            return 1e3 * distance

        def closure(guess: Tensor = guess, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            value = mismatch(guess)
            value.backward()  # type: ignore[no-untyped-call]
            return float(value.detach())

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        value = float(mismatch().detach())
        if value < best:
            best, found = value, guess.detach().clone()
    return found


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients])
