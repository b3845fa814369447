"""The sum of all sites' weights: what happens to a round when a new one is wanted and does not come about."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import classes_study, site_data

from medfl.server import weight_sum
from medfl.server.secagg.outcome import SecureSum, SumVoid
from medfl.simulations.federation import Federation, federate
from medfl.simulations.pace import Rhythm

WORKING = weight_sum.summed


def with_a_site_that_joins_in_round_2() -> Federation:
    study = classes_study(rounds={"count": 3, "minimum_sites": 3}, secure_aggregation={"mode": "msa1"})
    sites = {name: site_data(study, seed=n) for n, name in enumerate("abcd")}
    return federate(study, sites, rhythms={"d": Rhythm(joins=2)})


def test_a_site_that_joins_late_is_counted_and_trains() -> None:
    rounds = with_a_site_that_joins_in_round_2().rounds
    assert [sorted(site for site, word in r.outcomes.items() if word == "trained") for r in rounds] == [
        ["a", "b", "c"],
        ["a", "b", "c", "d"],
        ["a", "b", "c", "d"],
    ]


def test_where_it_cannot_be_counted_the_others_go_on_with_the_sum_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def only_once(*arguments: Any, **options: Any) -> SecureSum:
        asked.append(1)
        if len(asked) > 1:
            raise SumVoid("too few sites answered", confirmed=False)
        return WORKING(*arguments, **options)

    monkeypatch.setattr(weight_sum, "summed", only_once)
    federation = with_a_site_that_joins_in_round_2()
    assert len(asked) == 3  # it is tried again in each round
    for report in federation.rounds:
        assert sorted(site for site, word in report.outcomes.items() if word == "trained") == ["a", "b", "c"]
