"""Cases of NIfTI files: one for each channel, all on one grid, with a mask or classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medfl.client.data.case import Example, Quarantine
from medfl.client.data.dicom_cases import oriented
from medfl.client.data.names import Meaning
from medfl.client.data.nifti import read_mask_on, read_nifti
from medfl.client.data.volumes import in_hounsfield
from medfl.shared.data_spec import DataSpec, Modality


@dataclass(frozen=True, slots=True)
class NiftiCase:
    """One NIfTI file for each channel, all on one grid, with a mask or classes."""

    patient: str
    spec: DataSpec = field(repr=False)
    images: tuple[Path, ...] = field(repr=False)
    mask: Path | None = field(default=None, repr=False)
    label: frozenset[int] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict, repr=False)
    values: Mapping[int, int] | None = field(default=None, repr=False)  # of the mask -> class
    attributes: Mapping[str, str] = field(default_factory=dict)
    review: frozenset[str] = frozenset()

    @property
    def files(self) -> tuple[Path, ...]:
        """What the case is read from."""
        return self.images if self.mask is None else (*self.images, self.mask)

    @property
    def fingerprint(self) -> str:
        """The classes, what the mask's values mean, and what a person should look at."""
        names, values = sorted(self.aliases.items()), self.values and sorted(self.values.items())
        return repr((self.label and sorted(self.label), names, values, sorted(self.review)))

    def read(self) -> Example:
        """Decode the images and the mask; orient as the study says."""
        volumes = [read_nifti(path) for path in self.images]
        grid = volumes[0]
        for other in volumes[1:]:
            if other.spatial_shape != grid.spatial_shape or not np.allclose(other.affine, grid.affine, atol=0.01):
                raise Quarantine("channels on different grids")
        if self.spec.dimensions == 3 and 1 in grid.spatial_shape:
            raise Quarantine("one slice where a volume is expected")
        channels = [volume.array for volume in volumes]
        if self.spec.modality is Modality.CT and len(channels) == 1:
            channels = [in_hounsfield(channels[0])]
        mask = None
        if self.mask is not None:
            mask = read_mask_on(self.mask, grid, Meaning(self.spec, self.aliases, self.values))
        return oriented(grid, channels, mask, self.spec, self.label, self.review)
