"""From raw values to network input, as the study says, with MONAI's transforms. One case in, its examples out."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfl.client.data.case import Example, Quarantine
from medfl.shared.data_spec import DataSpec, Fit, Normalise, Preprocessing, Slices


def preprocess(example: Example, spec: DataSpec, *, held_out: bool) -> tuple[Tensor, Tensor | None]:
    """Images (N, channel, *size), float32 or uint8 (which stands for itself / 255), and masks (N, *size) uint8.

    ``N`` is 1 for volumes and pictures, the number of chosen slices for a 2D study of volumes. Masks are None for a
    classification. Images are resampled linearly, masks by nearest neighbour.

    Raises:
        Quarantine: spacing is needed and unknown, or values are not finite.
    """
    if not np.isfinite(example.intensity).all():
        raise Quarantine("pixel values that are not finite")
    steps = spec.preprocessing
    chosen = _slices(example, spec, held_out) if _is_stack(example, spec) else None
    image: Any = torch.from_numpy(np.ascontiguousarray(example.image))
    mask: Any = None if example.mask is None else torch.from_numpy(np.ascontiguousarray(example.mask))[None]
    # Statistics are the whole volume's, also where only some slices are kept, so that all slices share one scale.
    image = _normalise(image, steps)
    spacing = example.spacing_mm
    if chosen is None:
        image, mask = _to_size(image, mask, spacing, steps)
        return image[None], None if mask is None else mask
    everything = len(chosen) == image.shape[1]
    image = (image if everything else image[:, chosen]).movedim(1, 0)
    count, channels = image.shape[:2]
    mask = None if mask is None else mask[0] if everything else mask[0, chosen]
    image, mask = _to_size(image.flatten(0, 1), mask, spacing and spacing[1:], steps)  # slices travel as channels
    return image.unflatten(0, (count, channels)), mask


def _is_stack(example: Example, spec: DataSpec) -> bool:
    return spec.dimensions == 2 and example.image.ndim == 4


def _normalise(image: Tensor, steps: Preprocessing) -> Tensor:
    match steps.normalise:
        case Normalise.WINDOW:
            assert steps.window is not None  # noqa: S101 - the settings guarantee it
            low, high = steps.window
            return image.clamp(low, high).sub_(low).div_(high - low)
        case Normalise.ZSCORE:
            flat = image.flatten(1)
            mean, deviation = (
                s.reshape(-1, *[1] * (image.ndim - 1)) for s in (flat.mean(1), flat.std(1, correction=0))
            )
            return (image - mean) / deviation.clamp_min(1e-6)
        case Normalise.MINMAX:
            spatial = tuple(range(1, image.ndim))
            lowest, highest = image.amin(spatial, keepdim=True), image.amax(spatial, keepdim=True)
            return (image - lowest) / (highest - lowest).clamp_min(1e-6)
        case Normalise.SCALE_255:
            if float(image.min()) < 0 or float(image.max()) > 255:
                raise Quarantine("pixel values outside 0..255, which the study expects")
            return image / 255
        case Normalise.NONE:
            return image


def _to_size(
    image: Tensor, mask: Tensor | None, spacing: tuple[float, ...] | None, steps: Preprocessing
) -> tuple[Tensor, Tensor | None]:
    """Resample to ``spacing_mm``, then crop and pad or stretch to ``size``. Both are (channel, *spatial)."""
    from monai.transforms.croppad.array import ResizeWithPadOrCrop
    from monai.transforms.spatial.array import Resize

    if steps.spacing_mm is not None:
        if spacing is None:
            raise Quarantine("pixel spacing is unknown, but the study resamples")
        zoom = [old / new for old, new in zip(spacing, steps.spacing_mm, strict=True)]
        image = _zoom(image, zoom, "bilinear")
        mask = None if mask is None else _zoom(mask.float(), zoom, "nearest").to(torch.uint8)
    if tuple(image.shape[1:]) == steps.size:
        return image, mask
    if steps.fit is Fit.RESIZE:
        smooth = "bilinear" if len(steps.size) == 2 else "trilinear"
        shrinks = any(have > want for have, want in zip(image.shape[1:], steps.size, strict=True))
        to_size: Any = Resize(steps.size, mode=smooth, anti_aliasing=shrinks)
        mask_to_size: Any = Resize(steps.size, mode="nearest-exact")
    else:
        to_size = ResizeWithPadOrCrop(steps.size, value=float(image.amin()))
        mask_to_size = ResizeWithPadOrCrop(steps.size)
    image = to_size(image).as_tensor()
    return image, None if mask is None else mask_to_size(mask.float()).as_tensor().to(torch.uint8)


def _zoom(image: Tensor, zoom: list[float], mode: Literal["bilinear", "nearest"]) -> Tensor:
    """``image`` (channel, *spatial) on a grid with ``zoom`` times as many points about the same centre."""
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import Spacing

    if all(abs(factor - 1) < 1e-3 for factor in zoom):
        return image
    pixdim = [1 / factor for factor in zoom]
    resample: Any = Spacing(pixdim, mode=mode, padding_mode="border", dtype=None)
    resampled: Tensor = resample(MetaTensor(image, affine=torch.eye(image.ndim))).as_tensor()
    return resampled


def _slices(example: Example, spec: DataSpec, held_out: bool) -> list[int]:
    choice = spec.preprocessing.slices
    count = example.image.shape[1]
    if choice.per_case is None or choice.per_case >= count or (held_out and choice.held_out == "all"):
        return list(range(count))
    if example.mask is None:
        return _evenly(list(range(count)), choice.per_case)
    has = np.asarray(example.mask.reshape(count, -1).any(axis=1))
    return choose_slices(has, choice)


def choose_slices(has_foreground: NDArray[np.bool_], choice: Slices) -> list[int]:
    """Indices of the slices to keep, in order (see :class:`Slices`).

    >>> choose_slices(np.array([0, 0, 1, 1, 1, 1, 0, 0], bool), Slices(per_case=3, foreground=0.67))
    [3, 5, 6]
    """
    total = min(choice.per_case or len(has_foreground), len(has_foreground))
    inside, outside = np.flatnonzero(has_foreground).tolist(), np.flatnonzero(~has_foreground).tolist()
    n_inside = min(len(inside), round(choice.foreground * total))
    n_outside = min(len(outside), total - n_inside)
    n_inside = total - n_outside  # what background cannot give, foreground does
    return sorted(_evenly(inside, n_inside) + _evenly(outside, n_outside))


def _evenly(items: list[int], count: int) -> list[int]:
    """``count`` of ``items``, at the middles of ``count`` equal parts."""
    return [items[int((n + 0.5) * len(items) / count)] for n in range(count)]
