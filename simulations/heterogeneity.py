"""Scanners that differ: gamma, bias field, noise, resolution, inverted contrast, colour."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from medfl.client.data.tensors import SiteData, TensorSet
from medfl.simulations.config import Scanner

_COARSE = 4  # control points of the bias field along each axis


def as_scanned(data: SiteData, scanner: Scanner, *, seed: int) -> SiteData:
    """``data`` as ``scanner`` would have given it; masks and classes stay. The same for the same ``seed``."""
    if scanner == Scanner():
        return data
    draw = torch.Generator().manual_seed(seed)
    splits = {split: _scan_set(part, scanner, draw) for split, part in data.splits.items()}
    return SiteData(splits, data.report)


def _scan_set(part: TensorSet, scanner: Scanner, draw: torch.Generator) -> TensorSet:
    if not len(part):
        return part
    device = part.images.device
    images = part.inputs(part.rows).cpu()
    return TensorSet(scan(images, scanner, draw).to(device), part.labels, part.patients)


def scan(images: Tensor, scanner: Scanner, draw: torch.Generator) -> Tensor:
    """Changed ``images`` (N, channel, *spatial) float32, each back in the range it came from (noise may leave it).

    In the order of a device: bias field and gamma of the signal, resolution, noise, then the display.
    """
    axes = tuple(range(2, images.ndim))
    low = images.amin(axes, keepdim=True)
    extent = (images.amax(axes, keepdim=True) - low).clamp_min(1e-6)
    unit = (images - low) / extent
    if scanner.bias_field:
        unit = (unit * (1 + scanner.bias_field * _smooth(unit, draw))).clamp(0, 1)
    if scanner.gamma != 1:
        unit = unit**scanner.gamma
    if scanner.resolution != 1:
        mode = "bilinear" if len(axes) == 2 else "trilinear"
        coarse = [max(2, round(scanner.resolution * n)) for n in unit.shape[2:]]
        unit = interpolate(interpolate(unit, coarse, mode=mode), unit.shape[2:], mode=mode)
    if scanner.noise:
        unit = unit + scanner.noise * torch.randn(unit.shape, generator=draw)
    if scanner.invert:
        unit = 1 - unit
    if scanner.colour:
        factors = torch.tensor([scanner.colour[c % len(scanner.colour)] for c in range(unit.shape[1])])
        unit = unit * factors.view(1, -1, *[1] * len(axes))
    return unit * extent + low


def _smooth(unit: Tensor, draw: torch.Generator) -> Tensor:
    """A smooth field in -1..1, one for each image: (N, 1, *spatial)."""
    spatial = unit.shape[2:]
    coarse = torch.rand((len(unit), 1, *[min(_COARSE, n) for n in spatial]), generator=draw) * 2 - 1
    mode = "bilinear" if len(spatial) == 2 else "trilinear"
    return interpolate(coarse, spatial, mode=mode, align_corners=True)
