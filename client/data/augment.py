"""Random changes of a batch, on its device, one resampling for all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from medfl.client.data.batches import Augment
from medfl.shared.data_spec import Augmentation

_NOTHING = Augmentation()

_COARSE = 4
"""Control points along each axis of the smooth fields (bias, elastic)."""


def augmenter(how: Augmentation) -> Augment | None:
    """The function that :func:`~medfl.client.data.batches.epoch` applies to each batch; None when all is off."""
    if how == _NOTHING:
        return None
    return lambda images, labels, generator: augment(images, labels, how, generator)


def augment(images: Tensor, labels: Tensor, how: Augmentation, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Changed ``images`` (B, channel, *spatial) float32 and ``labels`` moved with them where they are masks.

    Every image of the batch gets its own draw. Geometry first (flip, turn, scale, elastic in one resampling: linear for
    images, nearest for masks; outside lies the nearest edge, class 0 for masks), then bias field, contrast and
    brightness, noise. ``generator`` is on the images' device.
    """
    if how.rotate_degrees or how.scale or how.elastic:
        images, labels = _resample(images, labels, how, generator)
    elif how.flip:
        images, labels = _flip(images, labels, generator)
    if how.bias_field:
        images = images * (1 + how.bias_field * _smooth_field(images, 1, generator).tanh())
    if how.intensity:
        contrast, brightness = (how.intensity * _uniform(images, generator) for _ in range(2))
        images = torch.addcmul(brightness, images, 1 + contrast)
    if how.noise:
        deviation = how.noise * _uniform(images, generator).abs()
        noise = torch.empty_like(images).normal_(generator=generator)
        images = torch.addcmul(images, noise, deviation)
    return images, labels


def _are_masks(images: Tensor, labels: Tensor) -> bool:
    return labels.ndim == images.ndim - 1 and labels.shape[1:] == images.shape[2:]


def _uniform(images: Tensor, generator: torch.Generator) -> Tensor:
    """One number in -1..1 for each image, shaped to broadcast over it."""
    shape = (len(images), *[1] * (images.ndim - 1))
    return torch.empty(shape, device=images.device).uniform_(-1, 1, generator=generator)


def _flip(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Exact: each of the two in-plane axes with probability 1/2."""
    masks = _are_masks(images, labels)
    for axis in (-1, -2):
        coin = torch.rand(len(images), device=images.device, generator=generator) < 0.5
        images = torch.where(coin.view(-1, *[1] * (images.ndim - 1)), images.flip(axis), images)
        if masks:
            labels = torch.where(coin.view(-1, *[1] * (labels.ndim - 1)), labels.flip(axis), labels)
    return images, labels


def _resample(images: Tensor, labels: Tensor, how: Augmentation, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    places = _places(_matrices(images, how, generator), images.shape[2:])
    if how.elastic:
        # The coordinates run -1..1, twice the extent. Any order of independent fields will do.
        places += 2 * how.elastic * _smooth_field(images, images.ndim - 2, generator)
    grid = places.movedim(1, -1)
    changed = grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if not _are_masks(images, labels):
        return changed, labels
    masks = labels.unsqueeze(1).to(images.dtype)
    return changed, grid_sample(masks, grid, mode="nearest", padding_mode="zeros", align_corners=False).squeeze(1).to(
        labels.dtype
    )


def _matrices(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """(B, d, d+1) maps from output to input in grid_sample's coordinates (x, y[, z] in -1..1)."""
    count, dimensions = len(images), images.ndim - 2
    rows, columns = images.shape[-2:]
    draw = torch.rand((4, count), device=images.device, generator=generator)
    angle = math.radians(how.rotate_degrees) * (2 * draw[0] - 1)
    size = 1 / (1 + how.scale * (2 * draw[1] - 1))
    signs = torch.where(draw[2:] < 0.5, -1.0, 1.0) if how.flip else torch.ones_like(draw[2:])
    cos, sin = angle.cos() * size, angle.sin() * size
    theta = torch.zeros((count, dimensions, dimensions + 1), device=images.device)
    # In -1..1 coordinates a turn of a picture that is not square needs the ratio of its sides.
    theta[:, 0, 0], theta[:, 0, 1] = cos * signs[0], -sin * signs[1] * rows / columns
    theta[:, 1, 0], theta[:, 1, 1] = sin * signs[0] * columns / rows, cos * signs[1]
    if dimensions == 3:
        theta[:, 2, 2] = 1
    return theta


def _places(matrices: Tensor, spatial: torch.Size) -> Tensor:
    """Where each voxel of the output comes from, as :func:`_matrices` say: (B, d, *spatial), coordinates x, y[, z].

    The same as ``torch.nn.functional.affine_grid``, which takes ten times as long with a product of matrices for each
    voxel: what an axis adds is the same all along the others.
    """
    dimensions = len(spatial)
    shifts, *steps = (part.reshape(*part.shape, *[1] * dimensions) for part in matrices.movedim(-1, 0).flip(0))
    places: Tensor = shifts
    for axis, (step, size) in enumerate(zip(steps, spatial, strict=True)):  # from z or y to x
        centres = (2 * torch.arange(size, device=matrices.device, dtype=matrices.dtype) + 1) / size - 1
        places = places + step * centres.view(-1, *[1] * (dimensions - 1 - axis))
    return places


def _smooth_field(images: Tensor, channels: int, generator: torch.Generator) -> Tensor:
    """Normal numbers on a coarse lattice, blown up to the images' extent: (B, channels, *spatial)."""
    spatial = images.shape[2:]
    coarse = torch.empty((len(images), channels, *[min(_COARSE, n) for n in spatial]), device=images.device)
    coarse.normal_(generator=generator)
    if len(spatial) == 2:
        return interpolate(coarse, spatial, mode="bicubic", align_corners=True)
    return interpolate(coarse, spatial, mode="trilinear", align_corners=True)
