"""Which clip each tensor gets."""

import numpy as np
import pytest

from medfl.shared.secagg.clipping import clip_by_class, clip_by_tensor, merge, widened
from medfl.shared.secagg.encoding import Segment
from medfl.shared.weights import Layout

LAYOUT = Layout((("conv.weight", (2, 3)), ("norm.weight", (2,)), ("norm.running_var", (2,)), ("head.bias", (1,))))


def test_running_statistics_have_a_clip_of_their_own_and_equal_neighbours_are_joined() -> None:
    assert clip_by_class(LAYOUT, weights=1.0, statistics=50.0) == (Segment(8, 1.0), Segment(2, 50.0), Segment(1, 1.0))


def test_after_an_aggregate_each_tensor_gets_four_times_its_largest_value_and_no_less_than_a_thousandth() -> None:
    aggregate = np.array([0.1, 0, 0, -0.5, 0, 0, 0, 0, 2.0, 0, 1.0], np.float32)
    # largest values 0.5, 0, 2, 1; the second is raised to a thousandth of 2
    clips = [
        (segment.length, segment.clip) for segment in clip_by_tensor(LAYOUT, aggregate, weights=1.0, statistics=50.0)
    ]
    assert clips == [(6, 2.0), (2, pytest.approx(0.008)), (2, 8.0), (1, 4.0)]


def test_an_aggregate_of_zeros_still_gives_clips_that_work() -> None:
    assert clip_by_tensor(LAYOUT, np.zeros(11, np.float32), weights=1.0, statistics=50.0) == (
        Segment(11, pytest.approx(0.004)),
    )


def test_no_tensor_gets_more_than_256_times_the_studys_clip() -> None:
    aggregate = np.full(11, 1000.0, np.float32)
    clips = [(s.length, s.clip) for s in clip_by_tensor(LAYOUT, aggregate, weights=1.0, statistics=50.0)]
    assert clips == [(8, 256.0), (2, 4000.0), (1, 256.0)]


def test_clips_double_up_to_256_times_the_first_ones() -> None:
    first = (Segment(5, 1.0), Segment(5, 3.0))
    assert widened(first, first) == (Segment(5, 2.0), Segment(5, 6.0))
    assert widened((Segment(5, 128.0), Segment(5, 384.0)), first) == (Segment(5, 256.0), Segment(5, 768.0))
    assert widened((Segment(5, 256.0), Segment(5, 768.0)), first) == (Segment(5, 256.0), Segment(5, 768.0))


def test_empty_segments_vanish() -> None:
    assert merge([Segment(0, 1.0), Segment(2, 3.0), Segment(0, 4.0), Segment(1, 3.0)]) == (Segment(3, 3.0),)
