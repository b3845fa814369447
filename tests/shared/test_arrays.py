from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st

from medfl.shared.arrays import as_array, as_numpy

KINDS = ["float32", "float64", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16"]


@given(kind=st.sampled_from(KINDS), size=st.integers(0, 300), order=st.sampled_from([1, -1, 2]))
def test_a_vector_is_written_as_flower_writes_it_and_read_back(kind: str, size: int, order: int) -> None:
    vector = np.arange(size * abs(order)).astype(kind)[::order]
    assert as_array(vector) == Array(vector)
    assert as_array(vector).object_id == Array(vector).object_id
    again = as_numpy(as_array(vector))
    assert again.dtype == vector.dtype
    assert again.tolist() == vector.tolist()


def test_reading_a_vector_copies_nothing() -> None:
    array = as_array(np.arange(5, dtype=np.float32))
    assert np.shares_memory(as_numpy(array), np.frombuffer(array.data, np.uint8))


@pytest.mark.parametrize("vector", [np.zeros((2, 3), "f4"), np.zeros(3, ">f4"), np.ones((), "f4")])
def test_what_is_no_plain_vector_is_read_by_numpy(vector: np.ndarray) -> None:
    again = as_numpy(Array(vector))
    assert again.shape == vector.shape
    assert again.dtype == vector.dtype


@pytest.mark.parametrize(
    ("dtype", "shape", "cut"), [("float32", (4,), 0), ("float64", (3,), 0), ("float32", (3,), 1), ("float32", (-3,), 0)]
)
def test_a_description_that_does_not_fit_the_bytes_is_not_believed(dtype: str, shape: tuple[int], cut: int) -> None:
    data = Array(np.arange(3, dtype=np.float32)).data
    array = Array(dtype, shape, "numpy.ndarray", data[: len(data) - cut])
    if cut:
        with pytest.raises(ValueError, match="EOF"):
            as_numpy(array)
    else:
        assert as_numpy(array).tolist() == [0.0, 1.0, 2.0]  # what the bytes themselves say
