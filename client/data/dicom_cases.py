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
from medfl.client.data.grids import mask_onto_grid, onto_grid
from medfl.client.data.labels import OneObject, combine, label_image, label_objects
from medfl.client.data.names import Meaning
from medfl.client.data.nifti import read_mask_on
from medfl.client.data.pixels import open_series
from medfl.client.data.planar import read_planar
from medfl.client.data.volumes import read_volume, slices_of_each
from medfl.shared.data_spec import DataSpec, Modality


@dataclass(frozen=True, slots=True)
class Drawn:
    """Label objects that were made on one series, or one image."""

    segmentations: tuple[Path, ...] = field(default=(), repr=False)
    structure_sets: tuple[Path, ...] = field(default=(), repr=False)

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return (*self.segmentations, *self.structure_sets)


@dataclass(frozen=True, slots=True)
class OutsideLabel:
    """A label that is no DICOM object: a mask file, or the classes themselves."""

    nifti: Path | None = field(default=None, repr=False)
    classes: frozenset[int] | None = None


@dataclass(frozen=True, slots=True)
class Stack:
    """Files of one series, what its values are, and what was drawn on it."""

    modality: Modality
    files: tuple[Path, ...] = field(repr=False)
    drawn: Drawn = Drawn()


@dataclass(frozen=True, slots=True)
class SeriesCase:
    """One series, or one for each channel; the first one's grid is the case's."""

    patient: str
    spec: DataSpec = field(repr=False)
    stacks: tuple[Stack, ...]
    label: OutsideLabel
    aliases: Mapping[str, str] = field(repr=False)
    attributes: Mapping[str, str]

    @property
    def files(self) -> tuple[Path, ...]:
        """What the case is read from."""
        images = [path for stack in self.stacks for path in stack.files]
        labels = [path for stack in self.stacks for path in stack.drawn.files]
        return (*images, *labels, *([self.label.nifti] if self.label.nifti else []))

    @property
    def fingerprint(self) -> str:
        """How many files and labels each channel has, what they are, the classes and the aliases."""
        stacks = [(stack.modality.value, len(stack.files), len(stack.drawn.files)) for stack in self.stacks]
        return repr((stacks, self.label.classes and sorted(self.label.classes), sorted(self.aliases.items())))

    def read(self) -> Example:
        """Decode, check, order and orient the volumes and bring the labels onto the grid of the first."""
        review: set[str] = set()
        volumes: list[hd.Volume] = []
        objects: list[OneObject] = []
        for stack in self.stacks:
            datasets = open_series(stack.files)
            for dataset in datasets:
                review |= admit(dataset)
            volumes.append(volume := read_volume(datasets, stack.modality))
            drawn, where = stack.drawn, slices_of_each(datasets, volume)
            for classes, names in label_objects(
                drawn.segmentations, drawn.structure_sets, volume, where, self.spec, self.aliases
            ):
                objects.append(({n: mask_onto_grid(mask, volume, volumes[0]) for n, mask in classes.items()}, names))
        grid = volumes[0]
        if self.spec.dimensions == 3 and len(grid.array) == 1:
            raise Quarantine("one slice where a volume is expected")
        mask: NDArray[np.uint8] | None = None
        unmatched: tuple[str, ...] = ()
        if self.label.nifti is not None:
            mask = read_mask_on(self.label.nifti, grid, Meaning(self.spec, self.aliases))
        elif self.label.classes is None:
            mask, unmatched = combine(objects, grid.spatial_shape)
        channels = [grid.array, *(onto_grid(volume, grid) for volume in volumes[1:])]
        return oriented(grid, channels, mask, self.spec, self.label.classes, frozenset(review), unmatched)


@dataclass(frozen=True, slots=True)
class ImageCase:
    """One planar image."""

    patient: str
    spec: DataSpec = field(repr=False)
    image: Path = field(repr=False)
    label: OutsideLabel
    aliases: Mapping[str, str] = field(repr=False)
    attributes: Mapping[str, str]
    drawn: Drawn = Drawn()

    @property
    def files(self) -> tuple[Path, ...]:
        """What the case is read from."""
        return (self.image, *self.drawn.files)

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
                self.drawn.segmentations, str(dataset.SOPInstanceUID), image.shape[1:], self.spec, self.aliases
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
