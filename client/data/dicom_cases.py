"""Cases of DICOM files: one or several series on one grid, or one planar image, each with its label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import highdicom as hd
import numpy as np
from numpy.typing import NDArray

from medfl.client.data.admission import admit
from medfl.client.data.case import Example, Quarantine
from medfl.client.data.grids import onto_grid
from medfl.client.data.labels import label_image, label_volume
from medfl.client.data.nifti import read_mask_on
from medfl.client.data.pixels import open_series
from medfl.client.data.planar import read_planar
from medfl.client.data.volumes import read_volume, slice_of_each
from medfl.shared.data_spec import DataSpec, Modality


@dataclass(frozen=True, slots=True)
class LabelFiles:
    """Where a case's label is: objects, a mask file, or the classes themselves."""

    segmentations: tuple[Path, ...] = field(default=(), repr=False)
    structure_sets: tuple[Path, ...] = field(default=(), repr=False)
    nifti: Path | None = field(default=None, repr=False)
    classes: frozenset[int] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that the label is read from."""
        return (*self.segmentations, *self.structure_sets, *([self.nifti] if self.nifti else []))


@dataclass(frozen=True, slots=True)
class Stack:
    """Files of one series, and what its values are."""

    modality: Modality
    files: tuple[Path, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class SeriesCase:
    """One series, or one for each channel; the first one's grid is the case's."""

    patient: str
    spec: DataSpec = field(repr=False)
    stacks: tuple[Stack, ...]
    label: LabelFiles
    aliases: Mapping[str, str] = field(repr=False)
    attributes: Mapping[str, str]

    @property
    def files(self) -> tuple[Path, ...]:
        """What the case is read from."""
        return (*(path for stack in self.stacks for path in stack.files), *self.label.files)

    @property
    def fingerprint(self) -> str:
        """How many files each channel has, what they are, the classes and the aliases."""
        stacks = [(stack.modality.value, len(stack.files)) for stack in self.stacks]
        return repr((stacks, self.label.classes and sorted(self.label.classes), sorted(self.aliases.items())))

    def read(self) -> Example:
        """Decode, check, order and orient the volumes and bring the labels onto their grid."""
        review: set[str] = set()
        volumes: list[hd.Volume] = []
        instances: dict[str, int] = {}
        for stack in self.stacks:
            datasets = open_series(stack.files)
            for dataset in datasets:
                review |= admit(dataset)
            volumes.append(read_volume(datasets, stack.modality))
            if not instances:
                instances = slice_of_each(datasets, volumes[0])
        grid = volumes[0]
        if self.spec.dimensions == 3 and len(grid.array) == 1:
            raise Quarantine("one slice where a volume is expected")
        mask: NDArray[np.uint8] | None = None
        unmatched: tuple[str, ...] = ()
        if self.label.nifti is not None:
            mask = read_mask_on(self.label.nifti, grid, self.spec)
        elif self.label.classes is None:
            mask, unmatched = label_volume(
                self.label.segmentations, self.label.structure_sets, grid, instances, self.spec, self.aliases
            )
        channels = [grid.array, *(onto_grid(volume, grid) for volume in volumes[1:])]
        return oriented(grid, channels, mask, self.spec, self.label.classes, frozenset(review), unmatched)


@dataclass(frozen=True, slots=True)
class ImageCase:
    """One planar image."""

    patient: str
    spec: DataSpec = field(repr=False)
    image: Path = field(repr=False)
    label: LabelFiles
    aliases: Mapping[str, str] = field(repr=False)
    attributes: Mapping[str, str]

    @property
    def files(self) -> tuple[Path, ...]:
        """What the case is read from."""
        return (self.image, *self.label.files)

    @property
    def fingerprint(self) -> str:
        """The classes and the aliases."""
        return repr((self.label.classes and sorted(self.label.classes), sorted(self.aliases.items())))

    def read(self) -> Example:
        """Decode, check and bring to display values, and the label onto its pixels."""
        (dataset,) = open_series([self.image])
        review = admit(dataset)
        image = read_planar(dataset, self.spec.channels)
        mask: NDArray[np.uint8] | None = None
        unmatched: tuple[str, ...] = ()
        if self.label.classes is None:
            mask, unmatched = label_image(
                self.label.segmentations, str(dataset.SOPInstanceUID), image.shape[1:], self.spec, self.aliases
            )
        return Example(image, _pixel_spacing(dataset), mask, self.label.classes, review, unmatched)


def oriented(
    grid: hd.Volume,
    channels: Sequence[NDArray[np.float32]],
    mask: NDArray[np.uint8] | None,
    spec: DataSpec,
    label: frozenset[int] | None = None,
    review: frozenset[str] = frozenset(),
    unmatched: tuple[str, ...] = (),
) -> Example:
    """Arrays on ``grid``, turned so that their axes run as the study says."""
    turn = [grid.with_array(array).to_patient_orientation(spec.preprocessing.orientation) for array in channels]
    arrays = [np.asarray(volume.array, np.float32) for volume in turn]
    image = arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
    if len(channels) != spec.channels:
        raise Quarantine(f"{len(channels)} channels, but the study has {spec.channels}")
    labels = None
    if mask is not None:
        labels = np.ascontiguousarray(
            grid.with_array(mask).to_patient_orientation(spec.preprocessing.orientation).array, np.uint8
        )
    return Example(image, tuple(float(step) for step in turn[0].spacing), labels, label, review, unmatched)


def _pixel_spacing(dataset: object) -> tuple[float, float] | None:
    """Row and column spacing in mm in the patient, or at the detector where only that is known."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        try:
            row, column = (float(value) for value in getattr(dataset, keyword))
        except (AttributeError, TypeError, ValueError):
            continue
        if 0 < row < inf and 0 < column < inf:
            return row, column
    return None
