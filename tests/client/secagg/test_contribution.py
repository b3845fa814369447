"""A contribution's fingerprint: the same for the same numbers, another for any other, and told by the key only."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from secagg_world import Consortium

KEY = bytes(range(32))
HELD = Consortium(3, length=1000).held[1]


def with_value(place: int, value: float) -> dict[str, Any]:
    vector = HELD.vector.copy()
    vector[place] = value
    return {"vector": vector}


def test_the_same_numbers_have_the_same_fingerprint_wherever_they_lie() -> None:
    apart = np.repeat(HELD.vector, 2)[::2]  # equal, and every other value of its memory
    assert len(HELD.fingerprint(KEY)) == 64
    assert replace(HELD, vector=apart).fingerprint(KEY) == HELD.fingerprint(KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 11},
        {"scalars": {"loss": 1.5}},
        {"encoding": replace(HELD.encoding, reference=61)},
        with_value(0, 0.5),
        with_value(999, 0.5),
        {"vector": HELD.vector[::-1]},
    ],
    ids=["weight", "scalar", "encoding", "first value", "last value", "order"],
)
def test_any_other_number_gives_another_fingerprint(change: dict[str, Any]) -> None:
    assert replace(HELD, **change).fingerprint(KEY) != HELD.fingerprint(KEY)


def test_numbers_in_another_encoding_are_told_as_the_same_numbers() -> None:
    other = replace(HELD, encoding=replace(HELD.encoding, reference=61)).fingerprint(KEY)
    assert other[:32] == HELD.fingerprint(KEY)[:32]
    assert replace(HELD, weight=11).fingerprint(KEY)[:32] != other[:32]


def test_without_the_key_a_fingerprint_says_nothing() -> None:
    assert HELD.fingerprint(KEY) != HELD.fingerprint(bytes(32))


def test_a_sum_without_a_vector_has_a_fingerprint_too() -> None:
    empty = Consortium(3, length=0).held[1]
    assert empty.fingerprint(KEY) != replace(empty, weight=99).fingerprint(KEY)
