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
from medfl.client.data.pixels import open_dataset
from medfl.shared.data_spec import DataSpec

_AREA = {"CLOSED_PLANAR", "CLOSEDPLANAR_XOR"}


def read_contours(
    path: Path, volume: hd.Volume, instances: Sequence[str], spec: DataSpec, aliases: Mapping[str, str]
) -> tuple[dict[int, NDArray[np.bool_]], Counter[str]]:
    """Voxels of each class in one RTSTRUCT, and names of regions that are no class.

    Contours are polygons in patient mm (PS3.3 C.8.8.6); a voxel is inside when its centre is. Polygons of one region in
    one slice are combined by exclusive or, which makes holes. rt-utils is wrong on pixels that are not square.

    Raises:
        Quarantine: unreadable, drawn on other images, a contour between slices or outside the volume.
    """
    dataset = open_dataset(path)
    try:
        regions = {int(item.ROINumber): item for item in dataset.StructureSetROISequence}
        drawn = {int(item.ReferencedROINumber): item for item in dataset.ROIContourSequence}
    except (AttributeError, TypeError, ValueError):
        raise Quarantine("unreadable structure set") from None
    out: dict[int, NDArray[np.bool_]] = {}
    unmatched: Counter[str] = Counter()
    for number, region in regions.items():
        name = str(region.get("ROIName") or "")
        label = spec.class_of(aliases.get(name, name))
        if label is None:
            unmatched[name] += 1
            continue
        contours = list(drawn[number].get("ContourSequence") or []) if number in drawn else []
        _drawn_here(region, contours, volume, set(instances))
        mask = out.setdefault(label, np.zeros(volume.spatial_shape, bool))
        mask |= _fill(contours, volume)
    return out, unmatched


def _drawn_here(
    region: pydicom.Dataset, contours: Sequence[pydicom.Dataset], volume: hd.Volume, instances: set[str]
) -> None:
    """The region shares the volume's frame of reference, or else every contour names one of its slices."""
    if str(region.get("ReferencedFrameOfReferenceUID") or "") == volume.frame_of_reference_uid:
        return
    named = [
        {str(image.get("ReferencedSOPInstanceUID")) for image in contour.get("ContourImageSequence") or []}
        for contour in contours
    ]
    if not named or not all(uids and uids <= instances for uids in named):
        raise Quarantine("label in another frame of reference")


def _fill(contours: Sequence[pydicom.Dataset], volume: hd.Volume) -> NDArray[np.bool_]:
    mask = np.zeros(volume.spatial_shape, bool)
    for contour in contours:
        if str(contour.get("ContourGeometricType")) not in _AREA:
            continue
        try:
            points = np.array([float(v) for v in contour.ContourData]).reshape(-1, 3)
        except (AttributeError, TypeError, ValueError):
            raise Quarantine("unreadable structure set") from None
        if len(points) < 3 or not np.isfinite(points).all():
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
        mask[at] ^= polygon2mask(mask.shape[1:], indices[:, 1:3])  # type: ignore[no-untyped-call]
    return mask
