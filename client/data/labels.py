"""Label objects of one case to one mask of class indices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import highdicom as hd
import numpy as np
from numpy.typing import NDArray

from medfl.client.data.case import Quarantine
from medfl.client.data.contours import read_contours
from medfl.client.data.segments import read_planar_segments, read_segments
from medfl.client.data.slices import Where
from medfl.shared.data_spec import DataSpec

OneObject = tuple[Mapping[int, NDArray[np.bool_]], Counter[str]]
"""Voxels of each class in one label object, and the names in it that are no class."""


def label_volume(
    segmentations: Sequence[Path],
    structure_sets: Sequence[Path],
    volume: hd.Volume,
    instances: Where,
    spec: DataSpec,
    aliases: Mapping[str, str],
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Class of every voxel of ``volume`` (see :func:`combine`), from the objects that were made on it."""
    objects = label_objects(segmentations, structure_sets, volume, instances, spec, aliases)
    return combine(objects, volume.spatial_shape)


def label_objects(
    segmentations: Sequence[Path],
    structure_sets: Sequence[Path],
    volume: hd.Volume,
    instances: Where,
    spec: DataSpec,
    aliases: Mapping[str, str],
) -> list[OneObject]:
    """Voxels of ``volume`` of each class in each object. ``instances`` says in which of its slices each frame of
    each SOP instance lies.
    """
    objects: list[OneObject] = [read_segments(path, volume, instances, spec, aliases) for path in segmentations]
    return objects + [read_contours(path, volume, instances, spec, aliases) for path in structure_sets]


def label_image(
    segmentations: Sequence[Path], instance: str, shape: tuple[int, ...], spec: DataSpec, aliases: Mapping[str, str]
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Class of every pixel of one image (see :func:`combine`), from the objects that were made on it.

    Raises:
        Quarantine: as :func:`combine`, or none was.
    """
    found = [read_planar_segments(path, instance, shape, spec, aliases) for path in segmentations]
    objects = [one for one in found if one is not None]
    if not objects:
        raise Quarantine("no label")
    return combine(objects, shape)


def combine(objects: Iterable[OneObject], shape: tuple[int, ...]) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Mask of class indices, and unmatched names. Where classes overlap, the later in the study's list wins.

    Raises:
        Quarantine: no object has a class of the study, or two objects both give one class (two readers: nobody here
            can say which is right).
    """
    mask = np.zeros(shape, np.uint8)
    seen: set[int] = set()
    unmatched: Counter[str] = Counter()
    for classes, names in objects:
        unmatched += names
        for label, voxels in classes.items():
            if label in seen:
                raise Quarantine("two label objects for one class")
            np.maximum(mask, voxels.view(np.uint8) * np.uint8(label), out=mask)
        seen |= set(classes)
    if not seen:
        raise Quarantine("no segment is a class of the study", tuple(unmatched))
    return mask, tuple(unmatched)
