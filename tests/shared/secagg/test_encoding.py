"""Numbers to integers and sums of them back: exact where promised, refused where it cannot work."""

import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl.shared.errors import ProtocolError, TrainingError
from medfl.shared.secagg.encoding import MAX_SCALAR, Encoding, Segment, decode_mean, decode_scalars, encode
from medfl.shared.secagg.rings import Ring

KEY = bytes(range(32))


def plan(length: int, clip: float = 1.0, ring: Ring = Ring.BITS_32, reference: int = 100, **more: object) -> Encoding:
    return Encoding(ring, (Segment(length, clip),), reference, **more)


def flat(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_the_whole_weight_at_the_clip_is_the_largest_integer() -> None:
    encoded = encode(flat(1, -1, 0.5, 7, -7), plan(5, ring=Ring.BITS_16), weight=100, scalars={})
    # 2^15 - 1 - 128 = 32639; half of it is 16319.5, which rounds to the even 16320
    assert encoded.vector.view(np.int16).tolist() == [32639, -32639, 16320, 32639, -32639]
    assert encoded.clipped == 2


def test_a_quarter_of_the_weight_is_a_quarter_of_the_integer() -> None:
    encoded = encode(flat(1), plan(1, ring=Ring.BITS_16), weight=25, scalars={})
    assert encoded.vector.tolist() == [8160]  # 32639 / 4 = 8159.75


def test_each_segment_has_its_own_clip() -> None:
    encoding = Encoding(Ring.BITS_16, (Segment(2, 1.0), Segment(1, 10.0)), 100)
    encoded = encode(flat(1, 2, 10), encoding, weight=100, scalars={})
    assert (encoded.vector.tolist(), encoded.clipped) == ([32639] * 3, 1)
    mean = decode_mean(encoded.vector, encoding, weight=100, terms=1)
    assert mean.tolist() == pytest.approx([1, 1, 10])


@settings(max_examples=60, deadline=None)
@given(
    ring=st.sampled_from(Ring),
    weights=st.lists(st.integers(1, 5000), min_size=3, max_size=128),
    seed=st.integers(0, 99),
    extreme=st.booleans(),
    stochastic=st.booleans(),
)
def test_the_mean_comes_back_within_half_a_step_a_term_and_never_overflows(
    ring: Ring, weights: list[int], seed: int, extreme: bool, stochastic: bool
) -> None:
    rng = np.random.default_rng(seed)
    clip, total_weight = float(rng.uniform(0.01, 100)), sum(weights)
    encoding = plan(50, clip, ring, total_weight, stochastic=stochastic)
    updates = [np.full(50, clip, np.float32) if extreme else rng.uniform(-clip, clip, 50).astype("f4") for _ in weights]
    total = np.zeros(50, ring.dtype)
    for update, weight in zip(updates, weights, strict=True):
        total += encode(update, encoding, weight=weight, scalars={}, rounding_key=rng.bytes(32)).vector
    mean = decode_mean(total, encoding, weight=total_weight, terms=len(weights))
    exact = sum(w * u.astype(np.float64) for w, u in zip(weights, updates, strict=True)) / total_weight
    step = clip / ring.scale
    assert np.abs(mean - exact).max() <= len(weights) * step * (1.0 if stochastic else 0.5) + 2e-7 * clip


def test_32_bits_keep_the_accuracy_of_float32() -> None:
    rng = np.random.default_rng(0)
    updates = rng.normal(0, 0.01, (16, 10_000)).astype(np.float32)
    encoding = plan(10_000, 0.1, Ring.BITS_32, 16)
    total = sum(encode(u, encoding, weight=1, scalars={}).vector for u in updates)
    mean = decode_mean(total, encoding, weight=16, terms=16)
    exact = updates.mean(0, dtype=np.float64)
    # a step is 0.1 / 2^31; 16 roundings make about 16^0.5 / 12^0.5 = 1.2 of them, far below float32's own 6e-8
    assert np.linalg.norm(mean - exact) / np.linalg.norm(exact) < 1e-7


def test_stochastic_rounding_has_the_right_mean_and_plain_rounding_has_not() -> None:
    # each value is 0.3 of a step: plainly rounded all are lost
    length = 200_000
    encoding = plan(length, 1.0, Ring.BITS_16, 1, stochastic=True)
    update = np.full(length, 0.3 / Ring.BITS_16.scale, np.float32)
    encoded = encode(update, encoding, weight=1, scalars={}, rounding_key=KEY).vector
    assert encoded.mean() == pytest.approx(0.3, abs=0.006)  # standard error (0.3 * 0.7 / 200,000)^0.5 = 0.001
    assert not encode(update, replace(encoding, stochastic=False), weight=1, scalars={}).vector.any()


def test_stochastic_rounding_needs_a_secret_key_and_another_key_rounds_otherwise() -> None:
    encoding, update = plan(1000, stochastic=True, ring=Ring.BITS_16), np.full(1000, 1e-5, np.float32)
    with pytest.raises(ValueError, match="32 bytes"):
        encode(update, encoding, weight=50, scalars={})
    one, other = (encode(update, encoding, weight=50, scalars={}, rounding_key=key).vector for key in (KEY, bytes(32)))
    assert (one != other).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 40_000, 69_999])
def test_a_value_that_is_not_finite_is_refused_wherever_it_stands(bad: float, place: int) -> None:
    update = np.zeros(70_000, np.float32)
    update[place] = bad
    with pytest.raises(TrainingError, match="not finite"):
        encode(update, plan(70_000), weight=1, scalars={})


def test_a_vector_of_another_length_or_type_is_refused() -> None:
    for bad in (np.zeros(4, np.float32), np.zeros(5, np.float64), np.zeros((5, 1), np.float32)):
        with pytest.raises(ProtocolError, match=r"expected float32\[5\]"):
            encode(bad, plan(5), weight=1, scalars={})


@pytest.mark.parametrize("weight", [0, -1, 101])
def test_a_weight_outside_the_consortiums_total_is_refused(weight: int) -> None:
    with pytest.raises(ProtocolError, match="between 1 and the consortium's total of 100"):
        encode(flat(1), plan(1), weight=weight, scalars={})


def test_scalars_are_exact_to_a_millionth_and_keep_their_sign() -> None:
    encoding = plan(1, scalars=("loss", "voxels"))
    totals = np.zeros(4, np.uint64)
    for weight, loss, voxels in ((10, -1.5, 2.0**35), (20, 0.1, 1.0)):
        totals += encode(flat(9), encoding, weight=weight, scalars={"voxels": voxels, "loss": loss}).scalars
    sums = decode_scalars(totals, encoding)
    assert sums == {"weight": 30, "clipped": 2, "loss": pytest.approx(-1.4, abs=2**-20), "voxels": 2.0**35 + 1}


@pytest.mark.parametrize(
    ("value", "problem"), [(np.nan, "not finite"), (MAX_SCALAR, "too large"), (-MAX_SCALAR, "too large")]
)
def test_a_scalar_that_cannot_be_summed_is_refused(value: float, problem: str) -> None:
    with pytest.raises(TrainingError, match=problem):
        encode(flat(1), plan(1, scalars=("loss",)), weight=1, scalars={"loss": value})


@pytest.mark.parametrize("scalars", [{}, {"loss": 1.0, "more": 1.0}, {"lost": 1.0}])
def test_other_scalars_than_the_encodings_are_refused(scalars: dict[str, float]) -> None:
    with pytest.raises(ProtocolError, match="not the ones that the encoding names"):
        encode(flat(1), plan(1, scalars=("loss",)), weight=1, scalars=scalars)


def test_a_sum_outside_what_its_terms_can_reach_is_refused() -> None:
    encoding = plan(1, ring=Ring.BITS_16)
    reach = int(32639 * 0.5) + 3  # half the weight is in the sum, of three terms
    good, bad = (np.array([value], np.uint16) for value in (reach, reach + 1))
    decode_mean(good, encoding, weight=50, terms=3)
    with pytest.raises(ProtocolError, match="outside what its terms can reach"):
        decode_mean(bad, encoding, weight=50, terms=3)
    with pytest.raises(ProtocolError, match="outside what its terms can reach"):
        decode_mean(-bad, encoding, weight=50, terms=3)


@pytest.mark.parametrize("weight", [0.0, -5.0, 101.0])
def test_weights_that_add_up_to_an_impossible_total_are_refused(weight: float) -> None:
    with pytest.raises(ProtocolError, match="add up to more"):
        decode_mean(np.zeros(1, np.uint32), plan(1), weight=weight, terms=3)


def test_decoding_uses_the_memory_of_the_sum() -> None:
    total = np.zeros(2_000_000, np.uint32)
    encoding = plan(total.size)
    tracemalloc.start()
    mean = decode_mean(total, encoding, weight=100, terms=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mean.base is total
    assert peak < 0.3 * total.nbytes


@pytest.mark.parametrize(
    "wrong",
    [
        {"segments": (Segment(0, 1.0),)},
        {"segments": (Segment(5, 0.0),)},
        {"segments": (Segment(5, float("nan")),)},
        {"segments": (Segment(5, float("inf")),)},
        {"reference": 0},
        {"reference": -1},
        {"scalars": ("loss", "loss")},
        {"scalars": ("weight",)},
        {"scalars": ("",)},
        {"scalars": ("größe",)},
    ],
)
def test_an_encoding_that_cannot_work_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        replace(plan(5), **wrong)


def test_every_part_of_an_encoding_is_in_its_digest() -> None:
    base = Encoding(Ring.BITS_32, (Segment(5, 1.0), Segment(6, 2.0)), 100, ("loss",))
    others = [
        replace(base, ring=Ring.BITS_16),
        replace(base, segments=(Segment(6, 1.0), Segment(5, 2.0))),
        replace(base, segments=(Segment(5, 1.5), Segment(6, 2.0))),
        replace(base, reference=101),
        replace(base, scalars=("loss2",)),
        replace(base, scalars=()),
        replace(base, stochastic=True),
    ]
    assert len({encoding.digest for encoding in (base, *others)}) == 8
    assert all(Encoding.parse(encoding.to_bytes()) == encoding for encoding in (base, *others))


def test_an_encoding_has_room_for_a_hundred_thousand_segments_and_ten_thousand_scalars() -> None:
    segments = (Segment(1, 1.0),) * 100_001
    names = tuple(f"s{number}" for number in range(10_001))
    Encoding(Ring.BITS_32, segments[1:], 100, names[1:])
    with pytest.raises(ProtocolError, match="too many segments or scalars"):
        Encoding(Ring.BITS_32, segments, 100)
    with pytest.raises(ProtocolError, match="too many segments or scalars"):
        Encoding(Ring.BITS_32, segments[1:], 100, names)


def test_a_head_that_promises_more_segments_than_there_may_be_is_refused_before_they_are_read() -> None:
    with pytest.raises(ProtocolError, match="has too many segments"):
        Encoding.parse(struct.pack("<BBQI", Ring.BITS_32, False, 100, 100_001))
