"""NIfTI files to volumes in DICOM's coordinates (LPS), and masks onto a volume's grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medfl.client.data.case import Quarantine
from medfl.client.data.grids import place
from medfl.client.data.guard import reading
from medfl.shared.data_spec import DataSpec

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MOST_BYTES = 4 * 2**30  # of voxels: a compressed file of a few megabytes may claim to hold hundreds of gigabytes
_SAME_MM = 0.05  # of any corner of the grid; float32 headers hold about 1e-5 of 500 mm


def read_nifti(path: Path, dtype: type[np.generic] = np.float32) -> hd.Volume:
    """One three-dimensional image with its place in space.

    Raises:
        Quarantine: unreadable, not three-dimensional, not in mm, without a place, or with two that differ.
    """
    with reading("unreadable NIfTI file"):
        image: Any = nib.load(path)
        header, affine = image.header, np.asarray(image.affine, float)
        space, _ = header.get_xyzt_units()
        both = header["sform_code"] > 0 and header["qform_code"] > 0
        neither = header["sform_code"] <= 0 and header["qform_code"] <= 0
        sform, qform = header.get_sform(), header.get_qform()
        if math.prod(image.shape) * header.get_data_dtype().itemsize > _MOST_BYTES:
            raise Quarantine("NIfTI file larger than any scan")
        array = np.asarray(image.dataobj)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 or array.dtype.kind not in "iuf":
        raise Quarantine("NIfTI file that is not one volume")
    if space not in {"mm", "unknown"}:
        raise Quarantine("NIfTI file that is not in millimetres")
    if neither:
        raise Quarantine("NIfTI file without a place in space")
    if both and _apart(sform, qform, array.shape) > _SAME_MM:
        raise Quarantine("NIfTI file with two different places in space")
    with reading("not a regular volume"):  # axes that are not at right angles
        return hd.Volume(array.astype(dtype), _RAS_TO_LPS @ affine, coordinate_system="PATIENT")


def read_mask_on(
    path: Path, grid: hd.Volume, spec: DataSpec, values: Mapping[int, int] | None = None
) -> NDArray[np.uint8]:
    """Class of every voxel of ``grid`` from a NIfTI label map; ``values`` translates what is not a class's index.

    Raises:
        Quarantine: as :func:`read_nifti`, on another grid, or with a value that is no class.
    """
    volume = read_nifti(path, np.float32)
    found = np.unique(volume.array)
    if not np.isfinite(found).all() or (found != np.round(found)).any():
        raise Quarantine("mask with values that are not whole")
    return _classes(place(volume, grid), found, spec, values)


def _classes(
    array: NDArray[Any], found: NDArray[Any], spec: DataSpec, values: Mapping[int, int] | None
) -> NDArray[np.uint8]:
    out = np.zeros(array.shape, np.uint8)
    for value in found.astype(int).tolist():
        named = spec.class_of(str(value))
        index = values.get(value) if values is not None else named if named is not None else value
        if index is None or not 0 <= index < len(spec.classes):
            raise Quarantine("mask value that is no class of the study")
        out[array == value] = index
    return out


def _apart(a: NDArray[Any], b: NDArray[Any], shape: tuple[int, ...]) -> float:
    """Largest distance in mm between where two affines put the corners of a grid."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    return float(np.abs((a - b) @ corners).max())
