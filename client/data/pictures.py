"""PNG, TIFF and JPEG files into arrays, and what is refused because it would have to be guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medfl.client.data.case import Quarantine
from medfl.client.data.guard import reading
from medfl.client.data.names import Meaning
from medfl.shared.data_spec import DataSpec, Normalise

_EXIF_ORIENTATION = 0x0112
_TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_GREY, _COLOUR = frozenset({"L", "I", "I;16", "I;16B", "I;16L", "F"}), frozenset({"RGB"})


def read_picture(path: Path, spec: DataSpec) -> NDArray[np.float32]:
    """Picture as (channel, row, column) float32, values as stored (0..255 for 8 bit, 0..65535 for 16).

    Raises:
        Quarantine: unreadable, several pages, rotated by EXIF, transparent, deeper than ``spec`` expects, or not of
            ``spec.channels`` channels.
    """
    pixels = _pixels(path, labels=False)
    if pixels.dtype.itemsize > 1 and spec.preprocessing.normalise is Normalise.SCALE_255:
        raise Quarantine("picture of more than 8 bits, but the study divides by 255")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if spec.channels == 1 and pixels.shape[2] == 3:
        if not ((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()):
            raise Quarantine("colour picture, but the study has one channel")
        pixels = pixels[..., :1]
    if pixels.shape[2] != spec.channels:
        raise Quarantine(f"picture of {pixels.shape[2]} channels, but the study has {spec.channels}")
    return np.ascontiguousarray(np.moveaxis(pixels, 2, 0), dtype=np.float32)


def read_mask(path: Path, meaning: Meaning, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Mask picture as class indices, (row, column) uint8. Where a palette has colours, its indices are the values.

    Raises:
        Quarantine: unreadable, not ``shape``, in colour, or with a value that is no class.
    """
    values = _pixels(path, labels=True)
    if values.ndim == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim != 2:
        raise Quarantine("mask in colour")
    if values.shape != shape:
        raise Quarantine("mask and image differ in size")
    return meaning.classes(values)


def _pixels(path: Path, *, labels: bool) -> NDArray[Any]:
    """(row, column) or (row, column, 3) as stored; a palette's colours, or with ``labels`` its indices."""
    with reading("unreadable picture"), Image.open(path) as picture:
        picture.verify()  # checksums of PNG, which decoding does not look at; nothing else can be done with it then
    with reading("unreadable picture"), Image.open(path) as picture:
        _refuse_what_pillow_changes(picture)  # first: to look for EXIF may load the pixels, and forget their form
        if getattr(picture, "n_frames", 1) != 1:
            raise Quarantine("picture of several pages")
        if picture.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            raise Quarantine("picture that EXIF says is rotated")
        if picture.mode in {"RGBA", "LA", "PA"} or "transparency" in picture.info:
            if picture.convert("RGBA").getchannel("A").getextrema() != (255, 255):
                raise Quarantine("picture with transparency")
            return _opaque(picture.convert(picture.mode.removesuffix("A")), labels=labels)
        return _opaque(picture, labels=labels)


def _opaque(picture: Image.Image, *, labels: bool) -> NDArray[Any]:
    match picture.mode:
        case "1":  # a mask's values are 0 and 1; a picture is black and white
            return np.asarray(picture if labels else picture.convert("L"), np.uint8)
        case "P":
            palette = np.array(picture.getpalette("RGB")).reshape(-1, 3)
            grey = (palette == palette[:, :1]).all()
            return np.asarray(picture if labels and not grey else picture.convert("L" if grey else "RGB"))
        case mode if mode in _GREY | _COLOUR:
            return np.asarray(picture)
    raise Quarantine("picture in an unknown colour space")


def _refuse_what_pillow_changes(picture: Image.Image) -> None:
    """It cuts colours of 16 bits to 8, and takes white for black in TIFF files of more than 8 bits."""
    tile: Any = getattr(picture, "tile", ())
    if picture.mode not in _GREY and any(";16" in str(part[3]) for part in tile):
        raise Quarantine("colour picture of more than 8 bits")
    photometric = getattr(picture, "tag_v2", {}).get(_TIFF_PHOTOMETRIC)
    if photometric == _WHITE_IS_ZERO and picture.mode not in {"1", "L"}:
        raise Quarantine("picture in an unknown colour space")
