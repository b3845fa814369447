"""One DICOM series to one volume, through highdicom, or a reason why not. Nothing is guessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import highdicom as hd
import numpy as np
import pydicom

from medfl.client.data.case import Quarantine
from medfl.client.data.guard import reading
from medfl.client.data.uptake import suv_factor
from medfl.shared.data_spec import Modality

AIR_HU = -1024.0
"""Lowest Hounsfield value kept. Scanners fill what lies outside the reconstruction circle with less (-2000, -3024)."""

_TOLERANCE_MM = 0.01


def read_volume(datasets: Sequence[pydicom.Dataset], modality: Modality) -> hd.Volume:
    """Volume of a series of single frames or of one multi-frame image: (slice, row, column) float32 in real units.

    Slices are ordered and spaced by Image Position (Patient), never by instance number or by tags that may lie.

    Raises:
        Quarantine: not one regular volume, or values that are not in the unit that ``modality`` means.
    """
    if not datasets:
        raise Quarantine("no slices")
    _one_scan(datasets)
    if len(datasets) > 1 or "PerFrameFunctionalGroupsSequence" not in datasets[0]:
        _regular(datasets)
    if modality is Modality.CT:
        _hounsfield(datasets)
    factors = {suv_factor(dataset) for dataset in datasets} if modality is Modality.PET else {1.0}
    if max(factors) > 1.001 * min(factors):
        raise Quarantine("mixed series")
    options: dict[str, Any] = {"dtype": np.float32, "apply_real_world_transform": False}
    with reading(_reason):
        if "PerFrameFunctionalGroupsSequence" in datasets[0]:
            volume = hd.Image.from_dataset(datasets[0], copy=False).get_volume(**options)
        else:
            volume = hd.get_volume_from_series(datasets, **options)
    if volume.number_of_channel_dimensions:
        raise Quarantine("colour volume")
    if modality is Modality.CT:
        return volume.clip(AIR_HU, None)
    return volume if factors == {1.0} else volume.with_array(volume.array * np.float32(max(factors)))


def _one_scan(datasets: Sequence[pydicom.Dataset]) -> None:
    for keyword in ("PatientID", "SOPClassUID", "FrameOfReferenceUID", "Rows", "Columns"):
        if len({str(dataset.get(keyword)) for dataset in datasets}) > 1:
            raise Quarantine("mixed series")
    if len({str(dataset.get("SOPInstanceUID")) for dataset in datasets}) < len(datasets):
        raise Quarantine("same instance twice")
    first = datasets[0]
    if len(datasets) > 1 and int(first.get("NumberOfFrames") or 1) > 1:
        raise Quarantine("mixed series")
    if int(first.get("SamplesPerPixel") or 1) != 1:
        raise Quarantine("colour volume")


def _regular(datasets: Sequence[pydicom.Dataset]) -> None:
    """Name what is wrong with the geometry. highdicom, which refuses the same, does not tell the cases apart."""
    if any("LOCALIZER" in [str(v).upper() for v in dataset.get("ImageType") or []] for dataset in datasets):
        raise Quarantine("localizer in the series")
    try:
        positions = np.array([[float(v) for v in d.ImagePositionPatient] for d in datasets])
        axes = np.array([[float(v) for v in d.ImageOrientationPatient] for d in datasets])
        spacings = np.array([[float(v) for v in d.PixelSpacing] for d in datasets])
    except (AttributeError, TypeError, ValueError):
        raise Quarantine("missing geometry") from None
    if positions.shape[1:] != (3,) or axes.shape[1:] != (6,) or spacings.shape[1:] != (2,):
        raise Quarantine("missing geometry")
    if not (np.isfinite(positions).all() and np.isfinite(axes).all() and (spacings > 0).all()):
        raise Quarantine("missing geometry")
    if np.ptp(axes, axis=0).max() > 1e-3 or np.ptp(spacings, axis=0).max() > 1e-4:
        raise Quarantine("mixed series")
    row, column = axes[0, :3], axes[0, 3:]
    if abs(row @ row - 1) > 1e-2 or abs(column @ column - 1) > 1e-2 or abs(row @ column) > 1e-2:
        raise Quarantine("missing geometry")
    if len(datasets) < 2:
        return
    normal = np.cross(row, column)
    order = np.argsort(positions @ normal)
    steps = np.diff((positions @ normal)[order])
    if steps.min() < _TOLERANCE_MM:
        raise Quarantine("duplicate slice position")
    if np.ptp(steps) > max(0.01 * float(np.median(steps)), 2 * _TOLERANCE_MM):
        raise Quarantine("missing slices")
    shear = np.diff(positions[order], axis=0) - steps[:, None] * normal
    if np.abs(shear).max() > max(0.005 * float(np.median(steps)), 2 * _TOLERANCE_MM):
        raise Quarantine("gantry tilt")


def _hounsfield(datasets: Sequence[pydicom.Dataset]) -> None:
    for dataset in datasets:
        shared = dataset.get("SharedFunctionalGroupsSequence") or [dataset]
        per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or [dataset]
        places = [place for group in (shared[0], per_frame[0], dataset) for place in _rescale_places(group)]
        found = [place for place in places if "RescaleSlope" in place and "RescaleIntercept" in place]
        if not found:
            raise Quarantine("CT without rescale to Hounsfield units")
        if str(found[0].get("RescaleType") or "HU").upper() not in {"HU", "US"}:
            raise Quarantine("CT in other units than Hounsfield")


def _rescale_places(group: pydicom.Dataset) -> list[pydicom.Dataset]:
    return [group, *(group.get("PixelValueTransformationSequence") or [])]


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if any(word in text for word in ("decod", "decompress", "pixel data", "codestream", "plugin")):
        return "unreadable pixels"
    if any(word in text for word in ("spac", "regular", "position", "orientation", "volume")):
        return "not a regular volume"
    return "unreadable series"
