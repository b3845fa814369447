"""PNG, TIFF and JPEG files into arrays, and what is refused because it would have to be guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medfl.client.data.case import Quarantine
from medfl.client.data.guard import reading
from medfl.shared.data_spec import DataSpec

_EXIF_ORIENTATION = 0x0112


def read_picture(path: Path, spec: DataSpec) -> NDArray[np.float32]:
    """Picture as (channel, row, column) float32, values as stored (0..255 for 8 bit, 0..65535 for 16).

    Raises:
        Quarantine: unreadable, several pages, rotated by EXIF, or not of ``spec.channels`` channels.
    """
    pixels = _open(path)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] == 4:
        if not (pixels[..., 3] == pixels[..., 3].max()).all():
            raise Quarantine("picture with transparency")
        pixels = pixels[..., :3]
    if spec.channels == 1 and pixels.shape[2] == 3:
        if not ((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()):
            raise Quarantine("colour picture, but the study has one channel")
        pixels = pixels[..., :1]
    if pixels.shape[2] != spec.channels:
        raise Quarantine(f"picture of {pixels.shape[2]} channels, but the study has {spec.channels}")
    return np.ascontiguousarray(np.moveaxis(pixels, 2, 0), dtype=np.float32)


def read_mask(path: Path, spec: DataSpec, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Mask picture as class indices, (row, column) uint8.

    With two classes anything but 0 is class 1. With more, a value is a class's index, or what ``label_map`` says of it.

    Raises:
        Quarantine: unreadable, not ``shape``, in colour, or with a value that is no class.
    """
    values = _open(path)
    if values.ndim == 3 and values.shape[2] == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim != 2:
        raise Quarantine("mask in colour")
    if values.shape != shape:
        raise Quarantine("mask and image differ in size")
    if len(spec.classes) == 2 and not spec.label_map:
        return np.asarray(values != 0, np.uint8)
    out = np.zeros(values.shape, np.uint8)
    for value in np.unique(values).tolist():
        index = spec.class_of(str(int(value)))
        index = int(value) if index is None and int(value) < len(spec.classes) else index
        if index is None:
            raise Quarantine("mask value that is no class of the study")
        out[values == value] = index
    return out


def _open(path: Path) -> NDArray[Any]:
    with reading("unreadable picture"), Image.open(path) as picture:
        if getattr(picture, "n_frames", 1) != 1:
            raise Quarantine("picture of several pages")
        if picture.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            raise Quarantine("picture that EXIF says is rotated")
        if picture.mode == "P":
            return np.asarray(picture.convert("RGB"))
        if picture.mode not in ("1", "L", "I", "I;16", "I;16B", "I;16L", "F", "RGB", "RGBA"):
            raise Quarantine("picture in an unknown colour space")
        return np.asarray(picture)
