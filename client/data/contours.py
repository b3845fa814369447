"""RTSTRUCT contours to class indices on the grid of the volume that they were drawn on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
from numpy.typing import NDArray
from skimage.draw import polygon2mask

from medfl.client.data.case import Quarantine
from medfl.client.data.guard import reading
from medfl.client.data.names import class_named
from medfl.client.data.pixels import open_dataset
from medfl.client.data.slices import Where, slices_named
from medfl.shared.data_spec import DataSpec

_EXCLUSIVE = "CLOSEDPLANAR_XOR"
_AREA = {"CLOSED_PLANAR", _EXCLUSIVE}


def read_contours(
    path: Path, volume: hd.Volume, instances: Where, spec: DataSpec, aliases: Mapping[str, str]
) -> tuple[dict[int, NDArray[np.bool_]], Counter[str]]:
    """Voxels of each class in one RTSTRUCT, and names of regions that are no class.

    Contours are polygons in patient mm (PS3.3 C.8.8.6); a voxel is inside when its centre is. A polygon inside another
    of the same region and slice is a hole. ``instances`` says in which slices of ``volume`` each image lies.
    rt-utils is wrong on pixels that are not square.

    Raises:
        Quarantine: unreadable, drawn on other images, a contour between slices or outside the volume, contours of one
            region that cross each other, or a region of the study that has no area.
    """
    dataset = open_dataset(path)
    with reading("unreadable structure set"):
        regions = {int(item.ROINumber): item for item in dataset.StructureSetROISequence}
        drawn = {int(item.ReferencedROINumber): item for item in dataset.ROIContourSequence}
        if len(regions) < len(dataset.StructureSetROISequence) or len(drawn) < len(dataset.ROIContourSequence):
            raise Quarantine("two regions of one number")
        for sources in _sources(dataset):
            if sources & set(instances) and not sources <= set(instances):
                raise Quarantine("label was made on slices that are missing")
    out: dict[int, NDArray[np.bool_]] = {}
    unmatched: Counter[str] = Counter()
    for number, region in regions.items():
        name = str(region.get("ROIName") or "").strip()
        label = class_named(name, spec, aliases)
        if label is None:
            unmatched[name] += 1
            continue
        with reading("unreadable structure set"):
            contours = list(drawn[number].get("ContourSequence") or []) if number in drawn else []
            areas = [contour for contour in contours if str(contour.get("ContourGeometricType")) in _AREA]
            marks = [contour for contour in contours if str(contour.get("ContourGeometricType")) == "POINT"]
            if not areas or len(areas) + len(marks) < len(contours):
                raise Quarantine("region without a closed contour" if not areas else "region that is not closed")
            _drawn_here(region, contours, volume, instances)
            mask = out.setdefault(label, np.zeros(volume.spatial_shape, bool))
            filled = _fill(areas, volume, instances)
            if not filled.any():
                raise Quarantine("region that covers no voxel")
            mask |= filled
    return out, unmatched


def _sources(dataset: pydicom.Dataset) -> list[set[str]]:
    """Images of each series that the object says it was drawn on (PS3.3 C.8.8.5)."""
    return [
        _named(series)
        for frame in dataset.get("ReferencedFrameOfReferenceSequence") or []
        for study in frame.get("RTReferencedStudySequence") or []
        for series in study.get("RTReferencedSeriesSequence") or []
    ]


def _named(contour: pydicom.Dataset) -> set[str]:
    return {str(image.get("ReferencedSOPInstanceUID")).strip() for image in contour.get("ContourImageSequence") or []}


def _drawn_here(
    region: pydicom.Dataset, contours: Sequence[pydicom.Dataset], volume: hd.Volume, instances: Where
) -> None:
    """Every image that a contour names is here; and the frame of reference is shared, or every contour names one."""
    named = [_named(contour) for contour in contours]
    frame = str(region.get("ReferencedFrameOfReferenceUID") or "").strip()
    if frame != volume.frame_of_reference_uid and not all(uids and uids <= set(instances) for uids in named):
        raise Quarantine("label in another frame of reference")
    if not set().union(*named) <= set(instances):
        raise Quarantine("label was made on slices that are missing")


def _fill(contours: Sequence[pydicom.Dataset], volume: hd.Volume, instances: Where) -> NDArray[np.bool_]:
    mask = np.zeros(volume.spatial_shape, bool)
    outlines: dict[int, list[NDArray[np.bool_]]] = {}
    for contour in contours:
        points = np.array([float(v) for v in contour.ContourData]).reshape(-1, 3)
        said = contour.get("NumberOfContourPoints")
        if len(points) < 3 or not np.isfinite(points).all() or (said is not None and int(said) != len(points)):
            raise Quarantine("unreadable structure set")
        indices = volume.map_reference_to_indices(points, round_output=False)
        depth = indices[:, 0]
        if np.ptp(depth) > 0.2 or abs(depth.mean() - round(depth.mean())) > 0.4:
            raise Quarantine("contour that lies in no slice")
        at = round(float(depth.mean()))
        rows, columns = mask.shape[1:]
        low, high = indices[:, 1:].min(axis=0), indices[:, 1:].max(axis=0)
        if not 0 <= at < len(mask) or (low < -1).any() or high[0] > rows or high[1] > columns:
            raise Quarantine("label reaches outside the image")
        if slices_named(contour.get("ContourImageSequence") or [], instances) - {at}:
            raise Quarantine("contour that lies in another slice than it names")
        inside = polygon2mask(mask.shape[1:], indices[:, 1:3])  # type: ignore[no-untyped-call]
        _refuse_self_crossing(indices[:, 1:3], inside)
        if str(contour.ContourGeometricType) != _EXCLUSIVE:
            for other in outlines.setdefault(at, []):
                _refuse_crossing(inside, other)
            outlines[at].append(inside)
        mask[at] ^= inside
    return mask


def _refuse_self_crossing(points: NDArray[np.float64], inside: NDArray[np.bool_]) -> None:
    """What a polygon that crosses itself encloses nobody can tell. Its area by the order of its points (the shoelace
    formula) is then another than what is filled; else they differ by at most half a voxel along the outline.
    """
    following = np.roll(points, -1, axis=0)
    area = abs(float((points[:, 0] * following[:, 1] - points[:, 1] * following[:, 0]).sum())) / 2
    outline = float(np.linalg.norm(following - points, axis=1).sum())
    if abs(float(inside.sum()) - area) > outline / 2 + 1 + 0.05 * area:
        raise Quarantine("contour that crosses itself")


def _refuse_crossing(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> None:
    """Exclusive or makes a hole of a polygon inside another. Of two that cross, or are the same, nobody can tell.

    Polygons that share an edge may share the voxels along it.
    """
    both, smaller, larger = (int(n) for n in ((one & other).sum(), *sorted((one.sum(), other.sum()))))
    if both > max(0.05 * smaller, 2) and (both < 0.95 * smaller or both > 0.95 * larger):
        raise Quarantine("contours of one region that cross each other")
