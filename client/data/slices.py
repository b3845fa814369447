"""Slices of a scan: where each lies and what its stored values mean, from single frames or frames of one file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from medfl.client.data.case import Quarantine
from medfl.client.data.pixels import padding_range, stored_frames


@dataclass(frozen=True, slots=True)
class Slice:
    """One plane. ``stored`` is (row, column) as in the file; real value = ``slope`` * stored + ``intercept``.

    ``position`` (3) is the centre of the first voxel in patient mm, ``axes`` (2, 3) the directions of growing column
    and growing row, ``spacing`` (2) mm between rows and between columns (PS3.3 C.7.6.2).
    """

    position: NDArray[np.float64]
    axes: NDArray[np.float64]
    spacing: NDArray[np.float64]
    slope: float
    intercept: float
    rescaled: bool  # whether the file gives slope and intercept
    unit: str  # of real values, as the file calls it; empty where it does not
    inverted: bool  # whether the smallest value is shown white
    bits: tuple[int, bool]  # how many are stored, and whether one is a sign
    padding: tuple[int, int] | None  # stored values from, to which mean "nothing was measured"
    stored: NDArray[Any] = field(repr=False)


def slices_of(datasets: Sequence[pydicom.Dataset]) -> list[Slice]:
    """Slices of single-frame images, or of one multi-frame image with functional groups (PS3.3 C.7.6.16).

    Raises:
        Quarantine: a place, a rescale or the pixels are missing or cannot be used.
    """
    return [found for dataset in datasets for found in _frames(dataset)]


Where = Mapping[str, tuple[int, ...]]
"""In which slice of a volume each frame of each SOP instance lies."""


def positions_of(dataset: pydicom.Dataset) -> list[NDArray[np.float64]]:
    """Position of each frame of an image that :func:`slices_of` has read, without its pixels."""
    return [_numbers(_group(place, "PlanePositionSequence"), "ImagePositionPatient", 3) for place in _places(dataset)]


def slices_named(images: Iterable[pydicom.Dataset], where: Where) -> set[int]:
    """Slices that references to ``images`` (PS3.3 10.3) name; none where they leave open which of several frames.

    Raises:
        Quarantine: an image has no such frame.
    """
    out = set()
    for image in images:
        frames = where.get(str(image.get("ReferencedSOPInstanceUID")).strip(), ())
        numbers = image.get("ReferencedFrameNumber")
        if numbers is None and len(frames) > 1:
            return set()
        for number in np.atleast_1d(1 if numbers is None else numbers).astype(int).tolist() if frames else ():
            if not 1 <= number <= len(frames):
                raise Quarantine("label of a frame that its image does not have")
            out.add(frames[number - 1])
    return out


def _frames(dataset: pydicom.Dataset) -> Iterator[Slice]:
    pixels, places = stored_frames(dataset), _places(dataset)
    if len(places) != len(pixels):
        alone = "PerFrameFunctionalGroupsSequence" not in dataset
        raise Quarantine("missing geometry" if alone else "frames and their descriptions differ in number")
    for place, stored in zip(places, pixels, strict=True):
        yield _slice(dataset, place, stored)


def _places(dataset: pydicom.Dataset) -> list[list[pydicom.Dataset]]:
    """For each frame, the parts of the header that describe it, the nearest first."""
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if groups is None:
        return [[dataset]]
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    return [[group, shared] for group in groups]


def _slice(dataset: pydicom.Dataset, places: Sequence[pydicom.Dataset], stored: NDArray[Any]) -> Slice:
    rescale = _group(places, "PixelValueTransformationSequence")
    if "ModalityLUTSequence" in dataset:
        raise Quarantine("table of values where slope and intercept are expected")
    slope, intercept = rescale.get("RescaleSlope"), rescale.get("RescaleIntercept")
    rescaled = slope is not None and intercept is not None
    if not rescaled and (slope is not None or intercept is not None):
        raise Quarantine("rescale that is not complete")
    factor, offset = (float(slope), float(intercept)) if rescaled else (1.0, 0.0)
    if not (math.isfinite(factor) and math.isfinite(offset) and factor != 0):
        raise Quarantine("rescale that makes all values equal")
    shape = dataset.get("PresentationLUTShape")
    inverted = shape == "INVERSE" if shape else dataset.get("PhotometricInterpretation") == "MONOCHROME1"
    return Slice(
        _numbers(_group(places, "PlanePositionSequence"), "ImagePositionPatient", 3),
        _numbers(_group(places, "PlaneOrientationSequence"), "ImageOrientationPatient", 6).reshape(2, 3),
        _numbers(_group(places, "PixelMeasuresSequence"), "PixelSpacing", 2),
        factor,
        offset,
        rescaled,
        str(rescale.get("RescaleType") or "").upper(),
        bool(inverted),
        (int(dataset.BitsStored), int(dataset.get("PixelRepresentation") or 0) == 1),
        padding_range(dataset),
        stored,
    )


def _group(places: Sequence[pydicom.Dataset], sequence: str) -> pydicom.Dataset:
    """The item that describes a frame; a single-frame image describes itself."""
    for place in places:
        if place.get(sequence):
            item: pydicom.Dataset = place[sequence][0]
            return item
    return places[0]


def _numbers(item: pydicom.Dataset, keyword: str, count: int) -> NDArray[np.float64]:
    try:
        values = np.array([float(value) for value in item[keyword].value])
    except (KeyError, TypeError, ValueError):
        raise Quarantine("missing geometry") from None
    if values.shape != (count,) or not np.isfinite(values).all():
        raise Quarantine("missing geometry")
    return values
