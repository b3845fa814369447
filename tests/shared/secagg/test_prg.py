"""The mask generator: known answers, and the fast form against the slow one."""

import hashlib
import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl.shared.secagg import prg
from medfl.shared.secagg.prg import Mask, add_masks, add_scalar_masks, random_words

KEY = bytes(range(32))


def test_the_first_words_of_a_known_key_are_known() -> None:
    words = np.zeros(6, np.uint32)
    add_masks(words, [Mask(KEY)])
    assert [f"{word:08x}" for word in words] == ["b60090f2", "d09f492a", "6a9af3a9", "80772edd", "ae765df0", "e59fb94a"]


def test_the_first_block_is_aes_of_zero_and_the_scalars_begin_at_the_middle_of_the_counter() -> None:
    block = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor()
    words, scalars = np.zeros(4, np.uint32), np.zeros(2, np.uint64)
    add_masks(words, [Mask(KEY)])
    add_scalar_masks(scalars, [Mask(KEY)])
    assert words.tobytes() == block.update(bytes(16))
    assert scalars.tobytes() == block.update(b"\x80" + bytes(15))


def test_the_hash_of_a_long_key_stream_is_known() -> None:
    assert hashlib.sha256(random_words(300_000, KEY).tobytes()).hexdigest()[:16] == "fb9ad982d3c80e58"


def slow(vector: np.ndarray, masks: list[Mask]) -> np.ndarray:
    out = vector.copy()
    for mask in masks:
        stream = Cipher(algorithms.AES(mask.key), modes.CTR(bytes(16))).encryptor().update(bytes(vector.nbytes))
        words = np.frombuffer(stream, vector.dtype)
        out = out - words if mask.subtract else out + words
    return out


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from((0, 1, 3, 4, 65_535, 65_536, 65_537, 131_072, 200_001)),
    dtype=st.sampled_from((np.uint16, np.uint32)),
    masks=st.lists(st.builds(Mask, st.binary(min_size=32, max_size=32), st.booleans()), max_size=4),
)
def test_blocks_do_not_show_in_the_result(size: int, dtype: type, masks: list[Mask]) -> None:
    vector = np.arange(size, dtype=dtype)
    fast = vector.copy()
    add_masks(fast, masks)
    assert np.array_equal(fast, slow(vector, masks))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_show_in_the_result(dtype: type, threads: int) -> None:
    one, many = np.zeros(7_000_003, dtype), np.zeros(7_000_003, dtype)
    masks = [Mask(KEY), Mask(bytes(32), subtract=True)]
    add_masks(one, masks)
    add_masks(many, masks, threads=threads)
    assert np.array_equal(one, many)


def test_a_part_that_fails_in_its_thread_fails_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(vector: np.ndarray, masks: list[Mask], counter: int) -> None:
        if counter:
            raise MemoryError

    monkeypatch.setattr(prg, "_add", no_memory)
    with pytest.raises(MemoryError):  # or half of the vector would leave without its masks
        add_masks(np.zeros(7_000_003, np.uint32), [Mask(KEY)], threads=2)


def test_a_mask_and_its_inverse_leave_nothing() -> None:
    vector = np.arange(100_000, dtype=np.uint32)
    add_masks(vector, [Mask(KEY), Mask(KEY).inverted()])
    assert np.array_equal(vector, np.arange(100_000))


def test_extra_memory_is_below_five_percent_of_the_vector() -> None:
    vector = np.zeros(5_000_000, np.uint32)
    tracemalloc.start()
    add_masks(vector, [Mask(bytes([i]) * 32) for i in range(4)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.05 * vector.nbytes
