"""From one grid of voxels in space to another: exactly for labels, linearly for a second channel."""

from __future__ import annotations

from typing import Any

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform

from medfl.client.data.case import Quarantine

_TOLERANCE_VOXELS = 0.05
"""How far a label's voxel may lie from the image's: positions are written with two decimals of a mm by some."""


def place(label: hd.Volume, grid: hd.Volume) -> NDArray[Any]:
    """Values of ``label`` at the voxels of ``grid`` (its shape, ``label``'s dtype), 0 where it has none.

    Axes may be turned, flipped, cropped or padded, not resampled. A label of one slice need not know its thickness.
    highdicom's ``match_geometry`` is not used: where it crops it can return another shape than asked for (0.28).

    Raises:
        Quarantine: a voxel of the label is not a voxel of the grid, or lies outside of it.
    """
    step = grid.inverse_affine @ label.affine
    extent = np.array(label.spatial_shape) - 1
    used = extent > 0
    matrix = np.where(used, step[:3, :3], 0)
    whole = np.round(matrix)
    off = (np.abs(matrix - whole) @ extent).max() + np.abs(step[:3, 3] - np.round(step[:3, 3])).max()
    one_to_one = (np.abs(whole).sum(axis=0) == used).all() and (np.abs(whole).sum(axis=1) <= 1).all()
    if off > _TOLERANCE_VOXELS or not one_to_one:
        raise Quarantine("label is not on the image's grid")
    found = np.stack(np.unravel_index(np.flatnonzero(label.array), label.spatial_shape), 1)  # argwhere is slow in 3D
    there = found @ whole.T.astype(int) + np.round(step[:3, 3]).astype(int)
    if (there < 0).any() or (there >= grid.spatial_shape).any():
        raise Quarantine("label reaches outside the image")
    out = np.zeros(grid.spatial_shape, label.array.dtype)
    out[tuple(there.T)] = label.array[tuple(found.T)]
    return out


def mask_onto_grid(mask: NDArray[np.bool_], volume: hd.Volume, grid: hd.Volume) -> NDArray[np.bool_]:
    """``mask``, which lies on the voxels of ``volume``, at the voxels of ``grid`` (nearest neighbour).

    Raises:
        Quarantine: the two do not share a frame of reference, or part of the mask lies outside of the grid.
    """
    if _same_grid(volume, grid):
        return mask
    between = _index_to_index(volume, grid)
    found = np.argwhere(mask)
    there = np.round(found @ np.linalg.inv(between)[:3, :3].T + np.linalg.inv(between)[:3, 3])
    if (there < 0).any() or (there >= grid.spatial_shape).any():
        raise Quarantine("label reaches outside the image")
    moved = affine_transform(
        mask.astype(np.uint8), between[:3, :3], between[:3, 3], output_shape=grid.spatial_shape, order=0
    )
    return np.asarray(moved, bool)


def onto_grid(volume: hd.Volume, grid: hd.Volume) -> NDArray[np.float32]:
    """``volume`` resampled linearly at the voxels of ``grid``; outside it, its lowest value.

    Raises:
        Quarantine: the two do not share a frame of reference, or do not overlap.
    """
    if _same_grid(volume, grid):
        return np.asarray(volume.array, np.float32)
    between = _index_to_index(volume, grid)
    ends = between @ np.array([[0, 0, 0, 1], [*(n - 1 for n in grid.spatial_shape), 1]], float).T
    limits = np.array(volume.spatial_shape, float)[:, None]
    if ((ends[:3] < -0.5).all(axis=1) | (ends[:3] > limits - 0.5).all(axis=1)).any():
        raise Quarantine("channels that do not overlap")
    lowest = float(volume.array.min())
    return np.asarray(
        affine_transform(
            volume.array, between[:3, :3], between[:3, 3], output_shape=grid.spatial_shape, order=1, cval=lowest
        ),
        np.float32,
    )


def _same_grid(volume: hd.Volume, grid: hd.Volume) -> bool:
    same_frame = volume.frame_of_reference_uid == grid.frame_of_reference_uid
    same_shape = volume.spatial_shape == grid.spatial_shape
    return same_frame and same_shape and np.allclose(volume.affine, grid.affine, atol=0.01)


def _index_to_index(volume: hd.Volume, grid: hd.Volume) -> NDArray[np.float64]:
    """(4, 4) from an index of ``grid`` to the index of ``volume`` at the same place.

    Raises:
        Quarantine: the two do not share a frame of reference.
    """
    if volume.frame_of_reference_uid != grid.frame_of_reference_uid:
        raise Quarantine("channels in different frames of reference")
    return np.asarray(volume.inverse_affine @ grid.affine, np.float64)
