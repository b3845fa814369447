"""Clips follow the sums, within limits, over restarts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import LOGISTIC_VALUES, classes_study

from medfl.server.clips import Clips
from medfl.server.secagg.outcome import SecureSum
from medfl.shared.algorithms.travel import build_study_network, layouts
from medfl.shared.privacy.adaptive_clip import number_within
from medfl.shared.secagg.encoding import Segment
from medfl.shared.study import Study
from medfl.shared.weights import Layout

STUDY = classes_study(secure_aggregation={"mode": "msa1", "clip": 0.5})


def layout_of(study: Study) -> Layout:
    return layouts(study, build_study_network(study))[0]


def clips(memory: Path | None = None, study: Study = STUDY) -> Clips:
    return Clips(study, layout_of(study), memory)


def told(clipped: float, *, mean: float = 0.1) -> SecureSum:
    """The sum of two sites, of 2 x 34 values."""
    return SecureSum(np.full(LOGISTIC_VALUES, mean, np.float32), 2.0, {}, clipped, (1, 2), 1, {})


def of(clip: float) -> tuple[Segment, ...]:
    return (Segment(LOGISTIC_VALUES, clip),)


def test_a_clip_that_cut_values_is_doubled_for_the_next_round(caplog: pytest.LogCaptureFixture) -> None:
    following = clips()
    following.follow(told(0), of(0.5))
    assert following.segments == of(0.5)
    following.follow(told(17), of(0.5))  # a quarter of 68
    assert following.segments == of(1.0)
    assert "25 % of the values were clipped: the clip is doubled" in caplog.text


def test_no_site_can_raise_the_clip_beyond_256_times_the_studys(caplog: pytest.LogCaptureFixture) -> None:
    following = clips()
    for _ in range(20):
        following.follow(told(17), following.segments)
    assert following.segments == of(128.0)
    assert "as large as it gets: raise secure_aggregation.clip" in caplog.text


@pytest.mark.parametrize("clipped", [-1.0, 69.0, 1e10])
def test_what_cannot_be_true_moves_no_clip(clipped: float, caplog: pytest.LogCaptureFixture) -> None:
    following = clips()
    following.follow(told(clipped), of(0.5))
    assert following.segments == of(0.5)
    assert "which cannot be" in caplog.text


def test_clips_outlive_the_process_and_following_a_sum_twice_changes_nothing(tmp_path: Path) -> None:
    memory = tmp_path / "clips.json"
    clips(memory).follow(told(17), of(0.5))
    again = clips(memory)
    assert again.segments == of(1.0)
    again.follow(told(17), of(0.5))
    assert again.segments == of(1.0)


@pytest.mark.parametrize(
    "content", ["", "[]", "[[33, 1.0]]", "[[34, 0.0]]", "[[34, NaN]]", "[34]", '{"a": 1}', "[[34]]"]
)
def test_a_damaged_memory_begins_anew_and_says_so(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = tmp_path / "clips.json"
    memory.write_text(content)
    assert clips(memory).segments == of(0.5)
    assert "the clips begin anew" in caplog.text


def test_narrow_rings_follow_each_tensor_up_to_the_same_limit() -> None:
    study = classes_study(secure_aggregation={"mode": "msa1", "clip": 0.5, "ring_bits": 16})
    following = clips(study=study)
    following.follow(told(0, mean=0.1), of(0.5))
    assert following.segments == (Segment(LOGISTIC_VALUES, pytest.approx(0.4)),)
    following.follow(told(0, mean=100.0), of(0.4))
    assert following.segments == of(128.0)


def client_level(**adaptive: object) -> Study:
    privacy = {"mode": "client-level", "epsilon": 50, "clip_norm": 0.5, "noise_multiplier": 3**0.5, **adaptive}
    return classes_study(privacy=privacy, secure_aggregation={"mode": "msa1", "clip": 0.5})


def test_clips_leave_room_for_each_sites_noise_and_stay_whatever_is_said_to_be_clipped() -> None:
    # a share for three sites is sqrt(3) * 0.5 / sqrt(3) = 0.5, and 0.5 + 8 * 0.5 = 4.5
    following = clips(study=client_level())
    assert following.of(()) == of(4.5)
    following.follow(told(17), of(4.5))
    assert following.of(()) == of(4.5)


def test_room_for_noise_follows_the_adaptive_clip() -> None:
    following = clips(study=client_level(adaptive_clip={}))
    assert following.of((number_within(2.0),)) == of(18.0)
