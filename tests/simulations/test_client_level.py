"""Client-level privacy through the production apps: what a secure sum of clipped and noised updates looks like."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tiny import classes_study, site_data

from medfl.server.ending import Ending
from medfl.shared.algorithms.travel import build_study_network
from medfl.shared.privacy.accounting import SampledGaussian, epsilon
from medfl.shared.study import Study
from medfl.simulations.federation import Federation, federate

PRIVACY: dict[str, Any] = {
    "mode": "client-level",
    "epsilon": 50,
    "delta": 1e-2,
    "clip_norm": 0.3,
    "noise_multiplier": 1.0,
}


def study(**changes: Any) -> Study:
    """Pictures of 32x32: 2 x 1024 weights and two biases."""
    large = {"normalise": "scale_255", "size": [32, 32]}
    base: dict[str, Any] = {
        "data": {"preprocessing": large},
        "model": {"name": "logistic", "inputs": 1024},
        "privacy": PRIVACY,
        "rounds": {"count": 1, "minimum_sites": 3},
        "secure_aggregation": {"mode": "msa1"},
    }
    return classes_study(**{**base, **changes})


def run(its: Study, count: int = 4) -> tuple[Federation, np.ndarray[Any, Any]]:
    """The federation and how far it moved the weights."""
    federation = federate(its, {f"site-{n}": site_data(its, seed=n) for n in range(count)})
    assert federation.result.ending is Ending.DONE
    start = federation.result.layout.flatten(build_study_network(its).state_dict())
    return federation, federation.result.weights - start


@pytest.mark.parametrize("noise_multiplier", [1.0, 20.0])
def test_the_mean_has_the_noise_of_the_surviving_sites(noise_multiplier: float) -> None:
    # A sum of 3 sites must have 1.0 * 0.3; each of the four adds 0.3 / sqrt(3) = 0.1732; their sum has 0.3464 and
    # their mean 0.0866. The updates are all but 0. The standard error from 2050 values is 1.6 %. With 20 times the
    # noise each site's share is 3.464, more than the largest entry of an update without noise.
    privacy = {**PRIVACY, "noise_multiplier": noise_multiplier}
    _, moved = run(study(training={"learning_rate": 1e-9}, privacy=privacy))
    assert moved.std() == pytest.approx(0.0866 * noise_multiplier, rel=0.08)


def test_a_long_update_is_clipped_before_the_noise() -> None:
    # at this rate a bare update is far longer than the clip; the mean of clipped ones is at most 0.3 long, and the
    # noise on it 0.0866 * sqrt(2050) = 3.92 (plus or minus 2 %)
    _, moved = run(study(training={"learning_rate": 10.0}))
    _, bare = run(study(training={"learning_rate": 10.0}, privacy={"mode": "none"}))
    assert np.linalg.norm(bare) > 10
    assert np.linalg.norm(moved) < 3.92 * 1.08 + 0.3


def test_each_round_is_charged_to_the_patients_and_nothing_exact_leaves() -> None:
    federation, _ = run(study(rounds={"count": 2, "minimum_sites": 3}))
    # with or without one patient, a site's update may turn around in the clip: half the noise multiplier
    expected = epsilon([SampledGaussian(0.5, 1.0, 2)], 1e-2)
    for rows in federation.site_rows.values():
        (last,) = [row for row in rows if row["set"] == "train" and row["round"] == 2]
        assert last["epsilon"] == pytest.approx(expected)
    assert all(report.training == {} and report.scores == {} for report in federation.rounds)


def test_the_clip_follows_the_updates_through_the_masked_sum(caplog: pytest.LogCaptureFixture) -> None:
    # All updates are far longer than 0.3 and the count is all but exact: each round the clip grows by exp(0.1).
    caplog.set_level("INFO", logger="medfl.server")
    adaptive = {**PRIVACY, "epsilon": 1e4, "adaptive_clip": {"count_noise": 0.05}}
    federation, _ = run(
        study(privacy=adaptive, training={"learning_rate": 10.0}, rounds={"count": 3, "minimum_sites": 3})
    )
    told = [record.getMessage() for record in caplog.records if "within the clip" in record.getMessage()]
    clips = [float(words.rpartition(" ")[2]) for words in told]
    assert clips == pytest.approx([0.3 * math.exp(0.1 * n) for n in (1, 2, 3)], rel=0.05)
    # neither the exact count nor the noised one is among what the coordinator reports
    assert all(report.training == {} for report in federation.rounds)


def test_the_count_is_charged_with_the_update() -> None:
    adaptive = {**PRIVACY, "adaptive_clip": {"count_noise": 1.0}}
    federation, _ = run(study(privacy=adaptive))
    # (1 / 1^2 + 1 / (2 * 1)^2) ** -0.5 = 0.894; a patient is charged half of it
    expected = epsilon([SampledGaussian(0.8944 / 2, 1.0, 1)], 1e-2)
    for rows in federation.site_rows.values():
        assert next(row for row in rows if row["set"] == "train")["epsilon"] == pytest.approx(expected, rel=1e-3)
