"""NIfTI files whose truth is known: the volumes of ``dicom_lab``, stored as NIfTI stores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from dicom_lab import hounsfield, lesion, spec
from numpy.typing import NDArray

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData

RAS = np.diag([0.9, 0.7, 2.5, 1.0])  # x right, y forwards, z up: spacing of columns, rows, slices
VOLUMES = spec(dimensions=3, preprocessing={"normalise": "none", "size": (6, 32, 32)})


def write(path: Path, array: NDArray[Any], affine: NDArray[np.float64] = RAS, unit: str = "mm") -> Path:
    """``array`` runs (x, y, z)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


def as_nifti(stack: NDArray[Any]) -> NDArray[Any]:
    """(slice up, row backwards, column to the left) to (x to the right, y forwards, z up)."""
    return np.ascontiguousarray(np.transpose(stack, (2, 1, 0))[::-1, ::-1])


def truth(data: SiteData, part: Split = Split.TRAIN) -> bool:
    """Whether every image has the lesion, its values are a known volume, and both are upright."""
    known = {hounsfield(n).astype(np.float32).tobytes() for n in range(20)}
    found = data.splits[part]
    return all(image[0].numpy().tobytes() in known for image in found.images) and all(
        np.array_equal(mask.numpy(), lesion()) for mask in found.labels
    )
