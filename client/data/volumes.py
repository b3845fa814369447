"""One DICOM series to one volume, or a reason why not. Nothing is guessed.

``highdicom.get_volume_from_series`` gives the same volume (a test holds it to that) in five times as long, and does
not say what is wrong with a series that it refuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import highdicom as hd
import numpy as np
import pydicom
from numpy.typing import NDArray

from medfl.client.data.case import Quarantine
from medfl.client.data.guard import reading
from medfl.client.data.slices import Slice, positions_of, slices_of
from medfl.client.data.uptake import suv_factor
from medfl.shared.data_spec import Modality

AIR_HU = -1024.0
"""Lowest Hounsfield value kept. Scanners fill what lies outside the reconstruction circle with less (-2000, -3024)."""

_HIGHEST_HU = 3071.0  # of 12 bits; a padding value above it is no tissue
_BEYOND_HU = 40000.0  # no scanner's extended scale goes so far: negative numbers whose sign was taken away do
_TOLERANCE_MM = 0.01
_ANGLE = 1e-3  # of the axes' length and right angle: headers are written with as few as four decimals


def read_volume(datasets: Sequence[pydicom.Dataset], modality: Modality) -> hd.Volume:
    """Volume of a series of single frames or of one multi-frame image: (slice, row, column) float32 in real units.

    Slices are ordered and spaced by Image Position (Patient), never by instance number or by tags that may lie.
    Pixels that pad the image become air (CT) or the lowest value of the rest.

    Raises:
        Quarantine: not one regular volume, or values that are not in the unit that ``modality`` means.
    """
    if not datasets:
        raise Quarantine("no slices")
    _one_scan(datasets)
    with reading("unreadable series"):
        slices = slices_of(datasets)
    ordered, affine = _regular(slices, datasets[0])
    if modality is Modality.CT:
        _hounsfield(ordered)
    if len({(found.rescaled, found.unit, found.inverted and modality is Modality.MR) for found in slices}) > 1:
        raise Quarantine("mixed series")
    if modality is not Modality.PET and _rescales(ordered) > 1:  # of PET each slice has its own by design
        raise Quarantine("rescale that differs between slices")
    factors = {suv_factor(dataset) for dataset in datasets} if modality is Modality.PET else {1.0}
    if max(factors) > 1.001 * min(factors):
        raise Quarantine("mixed series")
    array = _stack(ordered, modality)
    if factors != {1.0}:
        array *= np.float32(max(factors))
    frame = str(datasets[0].get("FrameOfReferenceUID") or "").strip() or None
    with reading("not a regular volume"):
        return hd.Volume(array, affine, coordinate_system="PATIENT", frame_of_reference_uid=frame)


def slices_of_each(datasets: Sequence[pydicom.Dataset], volume: hd.Volume) -> dict[str, tuple[int, ...]]:
    """Index along ``volume`` of each frame of each SOP instance that it was read from."""
    positions = [positions_of(dataset) for dataset in datasets]
    indices = volume.map_reference_to_indices(np.concatenate(positions), round_output=True)[:, 0].astype(int)
    ends = np.cumsum([len(found) for found in positions])[:-1]
    parts = np.split(indices, ends)
    return {str(d.SOPInstanceUID): tuple(part.tolist()) for d, part in zip(datasets, parts, strict=True)}


def _one_scan(datasets: Sequence[pydicom.Dataset]) -> None:
    for keyword in ("PatientID", "IssuerOfPatientID", "SOPClassUID", "FrameOfReferenceUID", "Rows", "Columns"):
        if len({str(dataset.get(keyword) or "").strip() for dataset in datasets}) > 1:
            raise Quarantine("mixed series")
    if len({str(dataset.get("SOPInstanceUID")) for dataset in datasets}) < len(datasets):
        raise Quarantine("same instance twice")
    if len(datasets) > 1 and any(int(dataset.get("NumberOfFrames") or 1) > 1 for dataset in datasets):
        raise Quarantine("mixed series")
    for dataset in datasets:
        if "LOCALIZER" in [str(value).upper() for value in dataset.get("ImageType") or []]:
            raise Quarantine("localizer in the series")


def _regular(slices: Sequence[Slice], first: pydicom.Dataset) -> tuple[list[Slice], NDArray[np.float64]]:
    """Slices in their order along the scan, and the affine from (slice, row, column) to patient mm.

    Raises:
        Quarantine: the planes are not parallel, evenly spaced and straight above each other.
    """
    axes = np.stack([found.axes for found in slices])
    spacings = np.stack([found.spacing for found in slices])
    if (spacings <= 0).any():
        raise Quarantine("missing geometry")
    if np.ptp(axes, axis=0).max() > _ANGLE or np.ptp(spacings, axis=0).max() > 1e-4:
        raise Quarantine("mixed series")
    row, column = axes[0]
    if max(abs(row @ row - 1), abs(column @ column - 1), abs(row @ column)) > _ANGLE:
        raise Quarantine("missing geometry")
    row, column = _right_angled(row, column)
    normal = np.cross(row, column)
    positions = np.stack([found.position for found in slices])
    order = np.argsort(positions @ normal, kind="stable")[::-1]  # highdicom's own direction: right-handed
    positions = positions[order]
    steps = -np.diff(positions @ normal)
    if len(slices) > 1:
        _evenly_spaced(positions, steps, normal)
        step = float(steps.mean())
    else:
        step = _thickness(first)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 3] = -normal * step, positions[0]
    affine[:3, 1], affine[:3, 2] = column * spacings[0, 0], row * spacings[0, 1]
    return [slices[n] for n in order], affine


def _evenly_spaced(positions: NDArray[np.float64], steps: NDArray[np.float64], normal: NDArray[np.float64]) -> None:
    usual = float(np.median(steps))
    if steps.min() < _TOLERANCE_MM:
        raise Quarantine("duplicate slice position")
    if np.ptp(steps) > max(0.01 * usual, 2 * _TOLERANCE_MM):
        raise Quarantine("missing slices")
    drift = np.abs(np.diff(positions, axis=0) + steps[:, None] * normal)
    along = positions - positions[0]
    whole = np.abs(along - (along @ normal)[:, None] * normal)
    if drift.max() > max(0.005 * usual, 2 * _TOLERANCE_MM) or whole.max() > max(0.05 * usual, 2 * _TOLERANCE_MM):
        raise Quarantine("gantry tilt")


def _right_angled(
    row: NDArray[np.float64], column: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Directions without the rounding of the header: of length 1, at right angles, both turned as little."""
    u, _, v = np.linalg.svd(np.stack([row, column]), full_matrices=False)
    row, column = u @ v
    return row, column


def _thickness(dataset: pydicom.Dataset) -> float:
    """Extent in mm of a slice that has no neighbour; 1 where the file does not say."""
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        value = dataset.get(keyword)
        if value is not None and 0 < float(value) < np.inf:
            return float(value)
    return 1.0


def _rescales(slices: Sequence[Slice]) -> int:
    """How many different rescales there are among slices whose values are stored alike: of two, one is damaged."""
    kinds = {found.bits for found in slices}
    return max(len({(found.slope, found.intercept) for found in slices if found.bits == kind}) for kind in kinds)


def _hounsfield(slices: Sequence[Slice]) -> None:
    if not all(found.rescaled for found in slices):
        raise Quarantine("CT without rescale to Hounsfield units")
    if any(found.unit not in {"", "HU", "US"} for found in slices):
        raise Quarantine("CT in other units than Hounsfield")


def _stack(slices: Sequence[Slice], modality: Modality) -> NDArray[np.float32]:
    """Real values of all slices, float32, as exact as that is."""
    array = np.empty((len(slices), *slices[0].stored.shape), np.float32)
    padded: list[tuple[int, NDArray[np.bool_]]] = []
    for number, found in enumerate(slices):
        if found.slope == 1:
            np.add(found.stored, np.float32(found.intercept), out=array[number], dtype=np.float32, casting="unsafe")
        else:
            array[number] = found.stored * found.slope + found.intercept
        if modality is Modality.MR and found.inverted:
            array[number] = _ends(found) - array[number]
        if found.padding is not None:
            where = (found.stored >= found.padding[0]) & (found.stored <= found.padding[1])
            if where.any():
                padded.append((number, where))
                if modality is Modality.CT and AIR_HU < array[number][where].max() <= _HIGHEST_HU:
                    raise Quarantine("padding value in the range of tissue")
    if modality is Modality.CT:
        for number, where in padded:
            array[number][where] = AIR_HU
        return in_hounsfield(array)
    if padded:
        _fill(array, padded)
    return array


def in_hounsfield(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """``array`` itself, changed: what is less than air is air.

    Raises:
        Quarantine: no scanner gives such values.
    """
    if array.max() > _BEYOND_HU:
        raise Quarantine("CT values beyond any scanner's scale")
    return np.maximum(array, np.float32(AIR_HU), out=array)


def _ends(found: Slice) -> np.float32:
    """Sum of the lowest and the highest real value that the stored bits can hold: what inverting counts from."""
    bits, signed = found.bits
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return np.float32((low + high) * found.slope + 2 * found.intercept)


def _fill(array: NDArray[np.float32], padded: Sequence[tuple[int, NDArray[np.bool_]]]) -> None:
    measured = np.ones(array.shape, bool)
    for number, where in padded:
        measured[number] = ~where
    if not measured.any():
        raise Quarantine("nothing but padding")
    array[~measured] = array[measured].min()
