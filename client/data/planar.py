"""Single DICOM images (radiographs, mammograms, ultrasound, photographs) as they are meant to be seen, 0..255."""

from __future__ import annotations

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut

from medfl.client.data.case import Quarantine
from medfl.client.data.guard import reading
from medfl.client.data.pixels import decode, padding_range, stored_frames

_COLOURS = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"})  # what decoding makes RGB of


def read_planar(dataset: pydicom.Dataset, channels: int) -> NDArray[np.float32]:
    """(channel, row, column) float32 in 0..255: grey through rescale, VOI LUT and MONOCHROME1; colours as RGB.

    Grey without a VOI LUT is scaled from the full range that its bits can store, never from what happens to occur.

    Raises:
        Quarantine: several frames, other colours than the study's, or pixels that cannot be decoded.
    """
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise Quarantine("several frames where one image is expected")
    samples = int(dataset.get("SamplesPerPixel") or 1)
    if samples == 3:
        if dataset.get("PhotometricInterpretation") not in _COLOURS:
            raise Quarantine("unknown colour space")
        return _colour(decode(dataset), 2 ** int(dataset.BitsStored) - 1, channels)
    photometric = str(dataset.get("PhotometricInterpretation") or "")
    if samples == 1 and photometric == "PALETTE COLOR":
        return _colour(*_through_palette(decode(dataset), dataset), channels)
    if samples != 1 or photometric not in {"MONOCHROME1", "MONOCHROME2"}:
        raise Quarantine("unknown colour space")
    shape = str(dataset.get("PresentationLUTShape") or "").strip()
    if shape and (shape == "INVERSE") != (photometric == "MONOCHROME1"):  # PS3.3 C.8.11.3.1.2
        raise Quarantine("polarity that contradicts itself")
    if channels != 1:
        raise Quarantine(f"grey image, but the study has {channels} channels")
    (stored,) = stored_frames(dataset)
    grey = _displayed(stored, dataset)
    shown = np.ascontiguousarray(255 - grey if photometric == "MONOCHROME1" else grey, np.float32)
    if (padding := padding_range(dataset)) is not None:
        shown[(stored >= padding[0]) & (stored <= padding[1])] = 0  # shown black, whatever white means
    return shown[None]


def _colour(rgb: NDArray[np.generic], top: int, channels: int) -> NDArray[np.float32]:
    """``rgb`` (row, column, 3), whose largest possible value is ``top``."""
    if channels == 1 and (rgb == rgb[..., :1]).all():  # grey stored as colour, as ultrasound often is
        rgb = rgb[..., :1]
    if rgb.shape[-1] != channels:
        raise Quarantine(f"colour image, but the study has {channels} channel{'s' * (channels != 1)}")
    return np.ascontiguousarray(np.moveaxis(rgb, -1, 0), np.float32) * np.float32(255 / top)


def _through_palette(stored: NDArray[np.generic], dataset: pydicom.Dataset) -> tuple[NDArray[np.generic], int]:
    """Colours (row, column, 3) that ``stored`` values stand for (PS3.3 C.7.6.3.1.5), and their largest possible value.

    Raises:
        Quarantine: tables are missing, contradict each other, or hold values of another depth than they say.
    """
    with reading("unreadable colour table"):
        (entries, first, bits), *others = (
            list(dataset[f"{colour}PaletteColorLookupTableDescriptor"].value) for colour in ("Red", "Green", "Blue")
        )
        indices = np.arange(first, first + (entries or 2**16))
        # pydicom counts entries in the type of the colours: more than 256 of 8 bits would begin again at 0.
        if others != [[entries, first, bits]] * 2 or len(indices) > 2**bits or bits not in {8, 16}:
            raise Quarantine("unreadable colour table")
        table = apply_color_lut(indices, dataset)
        top = 2**bits - 1
        # Some write 8-bit colours into tables that say 16: nearly black, or not, nobody knows.
        if table.shape != (len(indices), 3) or table.max() > top or (bits == 16 and table.max() < 256):
            raise Quarantine("unreadable colour table")
    return table[np.clip(stored.astype(np.int64), indices[0], indices[-1]) - first], top


def _displayed(stored: NDArray[np.generic], dataset: pydicom.Dataset) -> NDArray[np.float32]:
    """Stored values through modality LUT and VOI LUT (PS3.4 N.2), to 0..255 of the output range."""
    bits = int(dataset.BitsStored)
    signed = int(dataset.get("PixelRepresentation") or 0) == 1
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1], stored.dtype)
    with reading("unreadable display transform"):
        low, high = sorted(float(v) for v in np.asarray(apply_modality_lut(ends, dataset)).ravel())
        values = apply_modality_lut(stored, dataset)
        shown = np.asarray(apply_voi_lut(values, dataset), np.float32)
        table = dataset.get("VOILUTSequence")
    if not table and (values_table := dataset.get("ModalityLUTSequence")):
        table = values_table
    if table:
        low, high = 0.0, float(2 ** int(table[0].LUTDescriptor[2]) - 1)
    if not high > low:
        raise Quarantine("unreadable display transform")
    return np.asarray(np.clip((shown - low) * np.float32(255 / (high - low)), 0, 255), np.float32)
