"""Slow sites and late ones on the simulated clock, with and without a deadline, and what FedBuff makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tiny import classes_study, site_data

from medfl.shared.errors import ConfigError
from medfl.shared.study import Study
from medfl.simulations.config import Failures
from medfl.simulations.federation import Federation, federate
from medfl.simulations.pace import Rhythm
from medfl.strategies.build import build_strategy


def study(strategy: str = "fedavg", *, count: int = 4, minimum_sites: int = 2, **changes: Any) -> Study:
    return classes_study(
        strategy={"name": strategy}, rounds={"count": count, "minimum_sites": minimum_sites}, **changes
    )


def run(made: Study, rhythms: dict[str, Rhythm], *, sites: str = "abc", deadline: float | None = None) -> Federation:
    data = {name: site_data(made, seed=number) for number, name in enumerate(sites)}
    return federate(made, data, rhythms=rhythms, failures=Failures(deadline=deadline))


def outcomes(federation: Federation) -> list[dict[str, str]]:
    return [dict(report.outcomes) for report in federation.rounds]


def test_a_round_lasts_as_long_as_its_slowest_site() -> None:
    made = study()
    federation = run(made, {"c": Rhythm(3.0)})
    assert federation.times == (3.0, 6.0, 9.0, 12.0)
    # who is slow does not change what is learnt
    assert np.array_equal(federation.result.weights, run(made, {}).result.weights)
    assert run(made, {}).times == ()


def test_with_a_deadline_the_slow_site_never_counts() -> None:
    federation = run(study(), {"c": Rhythm(3.0)}, deadline=2.0)
    assert outcomes(federation) == [{"a": "trained", "b": "trained", "c": "no answer"}] * 4
    assert federation.times == (2.0, 4.0, 6.0, 8.0)
    assert sum(row["set"] == "train" for row in federation.site_rows["c"]) == 4  # it worked in vain


def test_fedbuff_goes_on_without_the_slow_site_and_takes_its_answer_when_it_comes() -> None:
    federation = run(study("fedbuff"), {"c": Rhythm(2.5)}, deadline=2.0)
    told = outcomes(federation)
    assert told[0] == {"a": "trained", "b": "trained", "c": "still training"}
    assert told[1]["c"] == "still training"
    assert told[2]["c"] == "trained"  # at 2.5, before a and b, who are asked at 2 and done at 3
    assert federation.times == (1.0, 2.0, 3.0, 4.0)


def test_an_old_answer_counts_less_and_no_answer_is_lost() -> None:
    made = study("fedbuff", count=2, minimum_sites=1)
    rhythms = {"a": Rhythm(1.0), "b": Rhythm(1.5)}
    federation = run(made, rhythms, sites="ab")
    assert outcomes(federation) == [
        {"a": "trained", "b": "still training"},
        {"a": "still training", "b": "trained"},
    ]
    # the first model of a alone, and what b makes of the very first one, times 2 ** -0.5 for being one round old
    start = federate(study(count=1, minimum_sites=1, training={"learning_rate": 1e-9}), {"a": site_data(made)}).result
    alone = [
        federate(study(count=1, minimum_sites=1), {name: site_data(made, seed=number)}).result.weights
        for number, name in enumerate("ab")
    ]
    steps = [model.astype(np.float64) - start.weights for model in alone]
    assert np.allclose(federation.result.weights, start.weights + steps[0] + 0.5**0.5 * steps[1], atol=1e-5)


def test_fedbuff_without_stragglers_is_fedavg() -> None:
    one, other = (run(study(name, minimum_sites=3), {}) for name in ("fedavg", "fedbuff"))
    assert np.allclose(one.result.weights, other.result.weights, atol=1e-6)


def test_a_late_site_takes_part_from_its_round_on() -> None:
    federation = run(study(), {"c": Rhythm(joins=3)})
    assert [sorted(told) for told in outcomes(federation)] == [["a", "b"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c"]]
    assert federation.times == (1.0, 2.0, 3.0, 4.0)


def test_fedbuff_is_refused_where_its_answers_cannot_be_protected() -> None:
    with pytest.raises(ConfigError, match="a secure sum is over all of one round"):
        build_strategy(study("fedbuff", secure_aggregation={"mode": "msa1"}))
    private = {"mode": "dp-sgd", "epsilon": 8, "delta": 1e-5, "clip_norm": 1, "expected_batch": 4}
    with pytest.raises(ValidationError, match="ledgers of sites at work cannot be compared"):
        study("fedbuff", privacy=private)
