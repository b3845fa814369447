"""What a simulation file may not ask for: what could never come about, and what nobody would do."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from tiny import classes_study

from medfl.simulations.config import Failures, SimulationSettings


def settings(*names: str, rounds: dict[str, Any] | None = None, **changes: Any) -> SimulationSettings:
    study = classes_study(rounds={"minimum_sites": 2} | (rounds or {}), **changes.pop("study", {}))
    sites = changes.pop("sites", [{"name": name} for name in names or ("a",)])
    drawn = [{"phantom": {"scanner": 0, "patients": 5}, **site} for site in sites]
    return SimulationSettings.model_validate({"study": study, "sites": drawn, **changes})


FEDBUFF = {"strategy": {"name": "fedbuff"}}
SLOW = {"partition": {"sites": 4, "stragglers": 1, "slowness": 4}, "failures": {"deadline": 2}}


def test_sites_too_slow_for_the_deadline_do_not_make_a_quorum() -> None:
    with pytest.raises(
        ValidationError, match=r"minimum_sites is 4, and 3 of the 4 sites .* answer within .* which is 2"
    ):
        settings(**SLOW, rounds={"minimum_sites": 4})
    settings(**SLOW, rounds={"minimum_sites": 3})
    settings(**SLOW | {"failures": {"deadline": 4}}, rounds={"minimum_sites": 4})  # as long as it takes is in time
    sites = [{"name": "a", "slowness": 3}, {"name": "b"}, {"name": "c", "joins": 2}, {"name": "d", "held_out": True}]
    settings(sites=sites, failures={"deadline": 3})
    with pytest.raises(ValidationError, match="1 of the 2 sites that train from round 1 answer within"):
        settings(sites=sites, failures={"deadline": 2})


def test_a_deadline_is_one_of_every_method_that_has_one() -> None:
    asynchronous = {**SLOW, "rounds": {"minimum_sites": 4}, "study": FEDBUFF}
    settings(**asynchronous, baselines={"fedavg": False})  # waits for nobody
    with pytest.raises(ValidationError, match="3 of the 4 sites"):
        settings(**asynchronous)  # the plain mean stands beside it
    with pytest.raises(ValidationError, match="3 of the 4 sites"):
        settings(**SLOW, variants={"all": {"rounds": {"minimum_sites": 4}}})


def test_a_secure_sum_takes_three_sites_that_are_in_time() -> None:
    secure: dict[str, Any] = {"study": {"secure_aggregation": {"mode": "msa1"}}}
    slow = {"partition": {"sites": 4, "stragglers": 2, "slowness": 4}, "failures": {"deadline": 2}}
    settings(**slow)
    with pytest.raises(ValidationError, match="a secure sum takes 3 sites, and 2 of the 4 sites"):
        settings(**slow, **secure)


def test_sites_that_never_answer_are_refused() -> None:
    for never in ({"drop_out": 1.0}, {"late": 1.0}, {"drop_out": 0.5, "late": 0.5}):
        with pytest.raises(ValidationError, match="must be below 1: no site would ever answer"):
            Failures.model_validate(never)
    with pytest.raises(ValidationError, match=r"phases\.unmask must be below 1"):
        Failures.model_validate({"phases": {"unmask": 1.0}})
    assert Failures(drop_out=0.5, late=0.4).late == 0.4


@pytest.mark.parametrize(
    ("said", "instead"),
    [
        ({"attacker": {"kind": "sign-flip"}}, "its attacker says nothing: use partition.attackers"),
        ({"slowness": 9}, "its slowness says nothing: use partition.stragglers"),
        ({"held_out": True}, "its held_out says nothing: use partition.held_out"),
        ({"joins": 3}, "its joins says nothing: list sites one by one"),
    ],
)
def test_what_the_one_site_of_a_partition_says_of_itself_is_refused(said: dict[str, Any], instead: str) -> None:
    with pytest.raises(ValidationError, match=instead):
        settings(sites=[{"name": "a", **said}], partition={"sites": 3})
    settings(sites=[{"name": "a", "scanner": {"gamma": 2.0}}], partition={"sites": 3})  # all its parts are seen so


def test_a_victim_is_one_of_the_partitions_sites_that_train() -> None:
    divided = {"sites": 10, "held_out": 1}
    settings(partition=divided, curious_server={"site": "site-09"})
    for nobody in ("site-9", "site-10", "a"):
        with pytest.raises(ValidationError, match=rf"curious_server\.site {nobody}: no site of that name trains"):
            settings(partition=divided, curious_server={"site": nobody})


def test_seeds_differ_and_a_studys_own_is_one_of_them() -> None:
    with pytest.raises(ValidationError, match="seeds must differ"):
        settings("a", "b", seeds=[0, 1, 0])
    with pytest.raises(ValidationError, match=r"study.seed is 77, .*: leave study.seed out, or write seeds: \[77\]"):
        settings("a", "b", study={"seed": 77})
    settings("a", "b", study={"seed": 77}, seeds=[76, 77])
