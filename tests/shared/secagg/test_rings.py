"""Rings: wire forms and sums taken from them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl.shared.errors import ProtocolError
from medfl.shared.secagg.rings import Ring


@pytest.mark.parametrize(
    ("ring", "bytes_a_value"), [(Ring.BITS_16, 2), (Ring.BITS_20, 2.5), (Ring.BITS_24, 3), (Ring.BITS_32, 4)]
)
def test_a_value_takes_its_bits_on_the_wire_and_no_more(ring: Ring, bytes_a_value: float) -> None:
    assert ring.pack(np.zeros(1000, ring.dtype)).nbytes == 1000 * bytes_a_value


def test_packing_is_little_endian() -> None:
    values = np.array([0x12345, 0xABCDE], np.uint32)
    assert Ring.BITS_20.pack(values).tobytes() == bytes.fromhex("4523e1cdab")  # 0xABCDE12345
    assert Ring.BITS_24.pack(values).tobytes() == bytes.fromhex("452301debc0a")


@settings(max_examples=60, deadline=None)
@given(ring=st.sampled_from(Ring), size=st.sampled_from((0, 1, 2, 3, 65_535, 65_536, 65_537)), seed=st.integers(0, 9))
def test_sums_from_the_wire_equal_sums_of_integers(ring: Ring, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = [rng.integers(0, 1 << ring, size, dtype=np.uint64) for _ in range(3)]
    total = np.zeros(size, ring.dtype)
    for vector in vectors:
        wire = ring.pack(vector.astype(ring.dtype))
        ring.check_wire(wire, size)
        ring.add_wire(total, wire)
    expected = sum(vectors) % (1 << ring)  # uint64: no overflow below 2^34
    signed = np.where(expected >= 1 << (ring - 1), expected.astype(np.int64) - (1 << ring), expected.astype(np.int64))
    assert np.array_equal(ring.centred(total), signed)


def test_a_vector_of_another_type_or_size_is_refused() -> None:
    for ring in Ring:
        good = ring.pack(np.zeros(8, ring.dtype))
        for bad in (good[:-1], good.astype(np.int64), good.reshape(2, -1), np.zeros(2 * good.size, good.dtype)[::2]):
            with pytest.raises(ProtocolError, match="masked vector"):
                ring.check_wire(bad, 8)
