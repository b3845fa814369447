"""DICOM segmentations (SEG) to voxels of each class, on the grid of the volume or image that they name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
from numpy.typing import NDArray

from medfl.client.data.case import Quarantine
from medfl.client.data.grids import place
from medfl.client.data.guard import reading
from medfl.client.data.names import class_named
from medfl.client.data.pixels import frames_are_described, open_series
from medfl.client.data.slices import Where, slices_named
from medfl.shared.data_spec import DataSpec

_SLICES_APART = 0.4


def read_segments(
    path: Path, volume: hd.Volume, instances: Where, spec: DataSpec, aliases: Mapping[str, str]
) -> tuple[dict[int, NDArray[np.bool_]], Counter[str]]:
    """Voxels of ``volume`` that are each class in one SEG object, and names of segments that are no class.

    Any type of SEG: binary, fractional (counts from one half), label map, overlapping, with empty frames left out.

    Raises:
        Quarantine: unreadable, on another frame of reference or grid, made on slices that are not among
            ``instances`` (so that a series of which the first or last slice was lost is noticed), or a frame lies in
            another slice than the one that it names.
    """
    seg, chosen, unmatched = _open(path, spec, aliases)
    frame = str(seg.get("FrameOfReferenceUID") or "").strip()
    if not frame or frame != volume.frame_of_reference_uid:
        raise Quarantine("label in another frame of reference")
    with reading("unreadable segmentation"):
        sources = _sources(seg)
    if not sources <= set(instances):
        raise Quarantine("label was made on slices that are missing")
    with reading("unreadable segmentation"):
        _lie_where_they_say(seg, volume, instances)
    return {label: _voxels(seg, numbers, volume) for label, numbers in chosen.items()}, unmatched


def read_planar_segments(
    path: Path, instance: str, shape: tuple[int, ...], spec: DataSpec, aliases: Mapping[str, str]
) -> tuple[dict[int, NDArray[np.bool_]], Counter[str]] | None:
    """As :func:`read_segments`, for one image without a place in space: (row, column) masks of ``instance``.

    None where the object was made on other images (of the same series): it says nothing of this one.

    Raises:
        Quarantine: unreadable, or of another size.
    """
    seg, chosen, unmatched = _open(path, spec, aliases)
    with reading("unreadable segmentation"):
        if instance not in _sources(seg):
            return None
    out = {}
    for label, numbers in chosen.items():
        with reading("segmentation of other images"):
            frames = seg.get_pixels_by_source_instance(
                [instance], segment_numbers=numbers, assert_missing_frames_are_empty=True, dtype=np.float32
            )
        out[label] = np.asarray((frames[0] >= 0.5).any(axis=-1))
        if out[label].shape != shape:
            raise Quarantine("label is not on the image's grid")
    return out, unmatched


def _sources(seg: hd.seg.Segmentation) -> set[str]:
    """Instances that the object, or one of its frames, says it was made on (PS3.3 C.12.4, C.7.6.16.2.6)."""
    named = [
        item
        for series in seg.get("ReferencedSeriesSequence") or []
        for item in series.get("ReferencedInstanceSequence") or []
    ]
    for frame in [*(seg.get("PerFrameFunctionalGroupsSequence") or []), *seg.SharedFunctionalGroupsSequence]:
        for derivation in frame.get("DerivationImageSequence") or []:
            named += derivation.get("SourceImageSequence") or []
    return {str(item.ReferencedSOPInstanceUID).strip() for item in named}


def _lie_where_they_say(seg: hd.seg.Segmentation, volume: hd.Volume, instances: Where) -> None:
    """A frame lies among the images, or frames of one, that it was made on: its place is written twice."""
    shared = (seg.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    for frame in seg.get("PerFrameFunctionalGroupsSequence") or []:
        derivations = frame.get("DerivationImageSequence") or shared.get("DerivationImageSequence") or []
        images = [image for derivation in derivations for image in derivation.get("SourceImageSequence") or []]
        named = slices_named(images, instances)
        place = frame.get("PlanePositionSequence") or shared.get("PlanePositionSequence")
        if not named or not place:
            continue
        position = np.array([[float(v) for v in place[0].ImagePositionPatient]])
        at = float(volume.map_reference_to_indices(position, round_output=False)[0, 0])
        if not min(named) - _SLICES_APART <= at <= max(named) + _SLICES_APART:
            raise Quarantine("label that lies in another slice than it names")


def _open(
    path: Path, spec: DataSpec, aliases: Mapping[str, str]
) -> tuple[hd.seg.Segmentation, dict[int, list[int]], Counter[str]]:
    """The object, its segment numbers of each class, and the names of segments that are no class."""
    with reading("unreadable segmentation"):
        (dataset,) = open_series([path])
        frames_are_described(dataset)
        seg = hd.seg.Segmentation.from_dataset(dataset, copy=False)
        _segments_are_described(seg)
        names = {number: seg.get_segment_description(number).segment_label for number in seg.segment_numbers}
    chosen: dict[int, list[int]] = {}
    unmatched: Counter[str] = Counter()
    for number, name in names.items():
        label = class_named(name, spec, aliases)
        if label is None:
            unmatched[name] += 1
        else:
            chosen.setdefault(label, []).append(number)
    return seg, chosen, unmatched


def _segments_are_described(seg: hd.seg.Segmentation) -> None:
    """Each number is one segment's, and frames belong to no other (a label map's frames name none)."""
    described = Counter(int(item.SegmentNumber) for item in seg.SegmentSequence)
    if described.total() > len(described):
        raise Quarantine("two segments of one number")
    named = {
        int(item.ReferencedSegmentNumber)
        for frame in [*(seg.get("PerFrameFunctionalGroupsSequence") or []), *seg.SharedFunctionalGroupsSequence]
        for item in frame.get("SegmentIdentificationSequence") or []
    }
    if not named <= set(described):
        raise Quarantine("frame of a segment that is not described")


def _voxels(seg: hd.seg.Segmentation, numbers: list[int], volume: hd.Volume) -> NDArray[np.bool_]:
    fractional = str(seg.get("SegmentationType")) == "FRACTIONAL"
    with reading("unreadable segmentation"):
        segments = seg.get_volume(segment_numbers=numbers, dtype=np.float32 if fractional else np.uint8)
    chosen = segments.array >= 0.5 if fractional else segments.array
    union = segments.with_array(np.asarray(chosen.any(axis=-1)), channels=None)
    return place(union, volume)
