"""Vectors <-> Flower's Arrays, in numpy's file format as Flower writes it, without parsing a header that is known.

For a small model numpy's reader and writer cost more than training it; for a large one they copy it twice.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from typing import Any

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import numpy as np
from flwr.app import Array
from numpy.typing import NDArray

_KIND = "numpy.ndarray"  # Flower's name of the format
_TYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name) for name in ("float32", "float64", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}  # numpy works a name out anew each time it is asked


def as_array(vector: NDArray[Any]) -> Array:
    """``vector``, which has one axis, as Flower's ``Array(vector)``: the same bytes."""
    name = _NAMES.get(vector.dtype) or vector.dtype.name
    header = _header(name, vector.size)
    data = b"".join((header, np.ascontiguousarray(vector).data))
    array = Array.__new__(Array)  # its constructor finds out at length which of its three forms this is
    array.__dict__.update(dtype=name, shape=vector.shape, stype=_KIND, data=data)
    return array


def as_numpy(array: Array) -> NDArray[Any]:
    """The numbers in ``array``; a vector is not copied, and cannot be written to.

    Raises:
        ValueError, MemoryError and others: what numpy makes of bytes in another format than theirs.
    """
    data, shape, dtype = array.data, array.shape, _TYPES.get(array.dtype)
    if array.stype == _KIND and dtype is not None and len(shape) == 1 and 0 <= shape[0] < len(data):
        header = _header(array.dtype, shape[0])
        if len(data) == len(header) + shape[0] * dtype.itemsize and data.startswith(header):
            return np.frombuffer(data, dtype, offset=len(header))
    return array.numpy()


@lru_cache(maxsize=256)
def _header(dtype: str, size: int) -> bytes:
    """What stands before the numbers of a vector."""
    file = BytesIO()
    described = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": described, "fortran_order": False, "shape": (size,)})
    return file.getvalue()
