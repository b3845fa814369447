from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfl.server.summation import FixedPointSum
from medfl.shared.errors import ProtocolError
from medfl.shared.weights import Flat


def summed(terms: list[tuple[Flat, int]]) -> FixedPointSum:
    total = FixedPointSum(terms[0][0].size)
    for update, weight in terms:
        total.add(update, weight)
    return total


def vector(*values: float) -> Flat:
    return np.array(values, np.float32)


def slow_mean(terms: list[tuple[list[float], int]]) -> list[float]:
    """The same with exact fractions: each term rounded to 2^-32, nothing rounded again before the end."""
    weight = sum(w for _, w in terms)
    columns = zip(*(values for values, _ in terms), strict=True)
    scaled = [
        sum(round(Fraction(value) * w * 2**32) for value, (_, w) in zip(column, terms, strict=True))
        for column in columns
    ]
    return [float(np.float32(float(s) / (weight * 2.0**32))) for s in scaled]


def test_the_mean_is_weighted_by_examples() -> None:
    assert summed([(vector(1, 2), 1), (vector(5, -2), 3)]).mean().tolist() == [4.0, -1.0]


def test_a_single_update_comes_back_to_within_half_a_unit_of_the_last_fraction_bit() -> None:
    update = vector(1 / 3, -1e-3, 12345.678, 0)
    assert np.abs(summed([(update, 1)]).mean() - update).max() <= 2**-33
    assert summed([(vector(0.5, -0.25), 7)]).mean().tolist() == [0.5, -0.25]


@st.composite
def some_terms(draw: st.DrawFn) -> list[tuple[list[float], int]]:
    length = draw(st.integers(1, 4))
    finite = st.floats(-1000, 1000, width=32)
    return draw(
        st.lists(
            st.tuples(st.lists(finite, min_size=length, max_size=length), st.integers(1, 3000)), min_size=1, max_size=6
        )
    )


@given(some_terms(), st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_change_a_bit(terms: list[tuple[list[float], int]], order: object) -> None:
    shuffled = list(terms)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    means = [summed([(vector(*values), w) for values, w in some]).mean().tobytes() for some in (terms, shuffled)]
    assert means[0] == means[1]


@given(some_terms())
def test_the_mean_is_that_of_exact_fractions(terms: list[tuple[list[float], int]]) -> None:
    assert summed([(vector(*values), w) for values, w in terms]).mean().tolist() == slow_mean(terms)


def test_updates_longer_than_a_block_are_added_whole() -> None:
    update = np.arange(3 * (1 << 18) + 5, dtype=np.float32) / 1024
    assert np.array_equal(summed([(update, 2), (update, 1)]).mean(), update)


@pytest.mark.parametrize(
    ("update", "weight", "words"),
    [
        (vector(1), 1, "has 1 values, the study's network has 2"),
        (vector(1, 2, 3), 1, "has 3 values"),
        (np.zeros((2, 1), np.float32), 1, "values"),
        (vector(1, 2), 0, "weight below 1"),
        (vector(1, 2), -5, "weight below 1"),
        (vector(1, np.nan), 1, "not finite"),
        (vector(np.inf, 1), 1, "not finite"),
        (vector(1, -np.inf), 1, "not finite"),
        (vector(2.0**22 + 1, 0), 1, "too large"),
        (vector(0, -(2.0**12)), 2**11, "too large"),
        (vector(np.finfo(np.float32).max, 0), 2**32, "too large"),
    ],
)
def test_an_update_that_cannot_be_summed_is_refused_and_leaves_no_trace(update: Flat, weight: int, words: str) -> None:
    total = summed([(vector(1, 2), 3)])
    with pytest.raises(ProtocolError, match=words):
        total.add(update, weight)
    assert (total.weight, total.terms) == (3, 1)
    assert total.mean().tolist() == [1.0, 2.0]


def test_whole_numbers_that_grow_out_of_16_bits_keep_every_bit() -> None:
    signs = np.where(np.arange(2 * (1 << 18) + 3) % 3 == 0, -1, 1).astype(np.float32)
    small, large = signs * np.float32(327.6), signs * np.float32(10_000)
    total = summed([(small, 100)])
    assert total.bytes_held == 6 * small.size, "whole numbers of 32,760 and below fit"
    total.add(large, 100)
    assert total.bytes_held == 8 * small.size, "a million does not"
    assert np.array_equal(total.mean(), ((small.astype(np.float64) + large) / 2).astype(np.float32))
    total.add(-large, 100)
    total.add(-small, 100)
    assert not total.mean().any()


def test_as_many_of_the_largest_terms_as_are_taken_do_not_overflow() -> None:
    total, largest = FixedPointSum(2), np.float32(np.nextafter(np.float32(2**22), np.float32(0)))
    for _ in range(512):
        total.add(vector(float(largest), -float(largest)), 1)
    assert total.mean().tolist() == [largest, -largest]
    with pytest.raises(ProtocolError, match="512 updates"):
        total.add(vector(0, 0), 1)


def test_the_largest_term_itself_is_refused_because_512_of_it_would_overflow() -> None:
    with pytest.raises(ProtocolError, match="too large"):
        FixedPointSum(1).add(vector(2.0**22), 1)


def test_the_mean_of_nothing_is_an_error() -> None:
    with pytest.raises(ProtocolError, match="no update"):
        FixedPointSum(2).mean()


def test_an_update_without_values_has_an_empty_mean() -> None:
    assert summed([(np.empty(0, np.float32), 1)]).mean().size == 0


_A_HUNDRED = """
import re
import numpy as np
from medfl.server.summation import FixedPointSum

def megabytes(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024

length, before = 30_000_000, megabytes("VmRSS")
total, update = FixedPointSum(length), np.full(length, 0.01, np.float32)
for site in range(100):
    update[site] = 1
    total.add(update, 10 + site)
del update
mean = total.mean()
print((megabytes("VmHWM") - before) / (4 * length / 2**20), float(mean[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_sites_of_30_million_values_are_summed_in_less_than_three_models() -> None:
    # one and a half models for the sum, one for the answer that is being added, and blocks of a few megabytes
    run = subprocess.run([sys.executable, "-c", _A_HUNDRED], capture_output=True, text=True, check=True)
    models, second = map(float, run.stdout.split())
    assert models < 2.7
    weight = sum(10 + site for site in range(100))
    assert second == pytest.approx((0.01 * 10 + 1.0 * (weight - 10)) / weight, rel=1e-5)  # 1 from the second site on
