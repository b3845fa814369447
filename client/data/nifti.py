"""NIfTI files to volumes in DICOM's coordinates (LPS), and masks onto a volume's grid."""

from __future__ import annotations

import gzip
import io
import math
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medfl.client.data.case import Quarantine
from medfl.client.data.grids import place
from medfl.client.data.guard import reading
from medfl.client.data.names import Meaning

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MOST_BYTES = 4 * 2**30  # of voxels: a compressed file of a few megabytes may claim to hold hundreds of gigabytes
_LONGEST_HEADER = 540  # of NIfTI-2
_SAME_STEP = 0.01  # of a voxel: how far its sizes by sform and by pixdim may differ
_SAME_MM = 0.05  # of any corner of the grid; float32 headers hold about 1e-5 of 500 mm


def read_nifti(path: Path, dtype: type[np.generic] = np.float32) -> hd.Volume:
    """One three-dimensional image with its place in space.

    Raises:
        Quarantine: unreadable, not three-dimensional, not in mm, without a place, or with two that differ.
    """
    with reading("unreadable NIfTI file"):
        image: Any = _whole(path)
        header, affine = image.header, np.asarray(image.affine, float)
        space, _ = header.get_xyzt_units()
        by_sform, by_qform = header["sform_code"] > 0, header["qform_code"] > 0
        array = np.asarray(image.dataobj)
        while array.ndim > 3 and array.shape[-1] == 1:
            array = array[..., 0]
        if array.ndim != 3 or array.dtype.kind not in "iuf":
            raise Quarantine("NIfTI file that is not one volume")
        if space not in {"mm", "unknown"}:
            raise Quarantine("NIfTI file that is not in millimetres")
        if not by_sform and not by_qform:
            raise Quarantine("NIfTI file without a place in space")
        if by_sform and by_qform and _apart(header.get_sform(), header.get_qform(), array.shape) > _SAME_MM:
            raise Quarantine("NIfTI file with two different places in space")
        steps, said = np.linalg.norm(affine[:3, :3], axis=0), np.asarray(header.get_zooms()[:3], float)
        if not np.allclose(steps, said, rtol=_SAME_STEP):  # also where one is not a number
            raise Quarantine("NIfTI file with two different voxel sizes")
    with reading("not a regular volume"):  # axes that are not at right angles
        return hd.Volume(array.astype(dtype), _RAS_TO_LPS @ affine, coordinate_system="PATIENT")


def _whole(path: Path) -> Any:
    """The image in one file that is as long as its header says, neither cut off nor moved.

    All of it is read: only the end of a compressed file has the checksum, and nibabel stops at the last voxel.

    Raises:
        Quarantine: too large, or of another length.
        Exception: damaged.
    """
    opened: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rb") as file:
        content = file.read(_LONGEST_HEADER)
        kinds: tuple[Any, ...] = (nib.Nifti1Image, nib.Nifti2Image)
        kind = next(kind for kind in kinds if kind.header_class.may_contain_header(content))
        header = kind.header_class.from_fileobj(io.BytesIO(content), check=False)  # a check would mend it
        itemsize, begin = header.get_data_dtype().itemsize, int(header["vox_offset"])
        length = begin + math.prod(header.get_data_shape()) * itemsize
        if length > _MOST_BYTES:
            raise Quarantine("NIfTI file larger than any scan")
        # NaN and 0 as a slope mean that values are as stored; nibabel takes an infinite one for that too.
        scaled = not np.isinf([header["scl_slope"], header["scl_inter"]]).any()
        # A header of two files shares this form: its voxels are in the other, and vox_offset counts from there.
        alone = header["magic"] == header.single_magic and begin >= header.single_vox_offset
        if not (scaled and alone and length > begin and header["bitpix"] == 8 * itemsize):
            raise Quarantine("NIfTI header that contradicts itself")
        content += file.read(max(0, length + 1 - len(content)))
        if len(content) != length or file.read(1):
            raise Quarantine("NIfTI file of another length than it says")
    return kind.from_bytes(content)


def read_mask_on(path: Path, grid: hd.Volume, meaning: Meaning) -> NDArray[np.uint8]:
    """Class of every voxel of ``grid`` from a NIfTI label map.

    Raises:
        Quarantine: as :func:`read_nifti`, on another grid, or with a value that is no class.
    """
    volume = read_nifti(path, np.float32)
    return place(volume.with_array(meaning.classes(volume.array)), grid)


def _apart(a: NDArray[Any], b: NDArray[Any], shape: tuple[int, ...]) -> float:
    """Largest distance in mm between where two affines put the corners of a grid."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    return float(np.abs((a - b) @ corners).max())
