"""DICOM segmentations (SEG) to class indices on the grid of the volume that they name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import highdicom as hd
import numpy as np
from numpy.typing import NDArray

from medfl.client.data.case import Quarantine
from medfl.client.data.headers import quiet
from medfl.shared.data_spec import DataSpec

_ALIGNED = 0.01  # voxels; offsets are printed with few decimals by some scanners


def read_segments(
    paths: Sequence[Path], volume: hd.Volume, spec: DataSpec, aliases: Mapping[str, str]
) -> tuple[NDArray[np.uint8], Counter[str]]:
    """Class of every voxel of ``volume`` (same shape, uint8), and how often each segment name was no class.

    Fractional segments count from one half. Where classes overlap, the later in ``spec.classes`` wins.

    Raises:
        Quarantine: unreadable, another frame of reference or grid, no segment of the study's classes, or two objects
            that both give one class (two readers: nobody here can say which is right).
    """
    mask = np.zeros(volume.spatial_shape, np.uint8)
    unmatched: Counter[str] = Counter()
    given: dict[int, int] = {}
    for which, path in enumerate(paths):
        for label, (voxels, names) in _classes(path, volume, spec, aliases).items():
            if label is None:
                unmatched.update(names)
                continue
            if given.setdefault(label, which) != which:
                raise Quarantine("two label objects for one class")
            mask[voxels & (mask < label)] = label
    if not given:
        raise Quarantine("no segment is a class of the study")
    return mask, unmatched


def _classes(
    path: Path, volume: hd.Volume, spec: DataSpec, aliases: Mapping[str, str]
) -> dict[int | None, tuple[NDArray[np.bool_], list[str]]]:
    """Voxels of each class in one file; under None the names of segments that are no class, with no voxels."""
    try:
        with quiet():
            seg = hd.seg.segread(path)
            names = {number: seg.get_segment_description(number).segment_label for number in seg.segment_numbers}
            frame = seg.get("FrameOfReferenceUID")
    except Exception:
        raise Quarantine("unreadable segmentation") from None
    if frame is None or frame != volume.frame_of_reference_uid:
        raise Quarantine("label in another frame of reference")
    numbers: dict[int | None, list[int]] = {}
    for number, name in names.items():
        numbers.setdefault(spec.class_of(aliases.get(name, name)), []).append(number)
    out: dict[int | None, tuple[NDArray[np.bool_], list[str]]] = {}
    for label, chosen in numbers.items():
        if label is None:
            out[None] = (np.zeros(0, bool), [names[number] for number in chosen])
        else:
            out[label] = (_voxels(seg, chosen, volume), [])
    return out


def _voxels(seg: hd.seg.Segmentation, numbers: list[int], volume: hd.Volume) -> NDArray[np.bool_]:
    try:
        with quiet():
            segments = seg.get_volume(segment_numbers=numbers, dtype=np.float32)
    except Exception:
        raise Quarantine("unreadable segmentation") from None
    if not segments.array.any():  # empty on purpose: the reader looked and found nothing
        return np.zeros(volume.spatial_shape, bool)
    union = segments.with_array(np.asarray((segments.array >= 0.5).any(axis=-1)), channels=None)
    try:
        with quiet():
            matched = union.match_geometry(volume, tol=_ALIGNED)
    except Exception:
        raise Quarantine("label is not on the image's grid") from None
    voxels = np.asarray(matched.array, bool)
    if int(voxels.sum()) != int(union.array.sum()):
        raise Quarantine("label reaches outside the image")
    return voxels
