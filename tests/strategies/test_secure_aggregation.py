"""What a strategy of the mean gets of a round that was summed, and which strategies a sum does not suffice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scripted import ScriptedGrid, ScriptedSite
from tiny import classes_study

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Message
from flwr.serverapp.strategy import Strategy

from medfl.shared.algorithms.needs import Demands
from medfl.shared.errors import ConfigError
from medfl.shared.messages import TENSOR, pack, request_config
from medfl.shared.secagg.roster import Member, Roster, make_roster
from medfl.shared.study import Study
from medfl.shared.weights import Flat
from medfl.strategies.build import build_strategy
from medfl.strategies.replies import as_reply
from medfl.strategies.secure_aggregation import require_sum_suffices, require_sums_come_about, virtual_reply

SENT = np.array([1, 2], np.float32)
UPDATES = {1: np.array([4, 0], np.float32), 3: np.array([0, -8], np.float32)}  # by weight
MEAN = np.array([1, -6], np.float32)  # (1 * 4 + 3 * 0) / 4; (1 * 0 - 3 * 8) / 4


@pytest.fixture(autouse=True)
def _in_a_run() -> None:
    ScriptedGrid({})  # messages can be made inside a run only


def read(reply: Message) -> tuple[list[float], float]:
    """The vector of a reply, and how many examples it stands for."""
    return reply.content.array_records["arrays"][TENSOR].numpy().tolist(), float(
        reply.content.metric_records["metrics"]["num-examples"]  # type: ignore[arg-type]
    )


def model_from(strategy: Strategy, replies: list[Message]) -> Flat:
    """What ``strategy`` makes of a second round, the first having been the same."""
    grid = ScriptedGrid({str(n): ScriptedSite() for n in range(len(replies))})
    for number in (1, 2):
        list(strategy.configure_train(number, pack(SENT), request_config("0" * 64, number), grid))
        arrays, _ = strategy.aggregate_train(number, replies)
    assert arrays is not None
    return arrays[TENSOR].numpy().astype(np.float32)


def test_the_virtual_reply_is_the_weights_that_the_mean_update_leads_to() -> None:
    assert read(virtual_reply(SENT, MEAN, 4.0, Demands())) == ([2.0, -4.0], 4.0)


def test_a_strategy_of_updates_gets_the_mean_update_with_what_travels_beside_it() -> None:
    both = np.array([1, -6, 7], np.float32)
    assert read(virtual_reply(SENT, both, 4.0, Demands(takes_updates=True))) == ([1.0, -6.0, 7.0], 4.0)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_flowers_strategies_make_the_same_of_the_virtual_reply_as_of_each_sites_own(name: str) -> None:
    study = classes_study(strategy={"name": name}, rounds={"minimum_sites": 2})
    single = [as_reply(SENT + update, weight) for weight, update in UPDATES.items()]
    virtual = [virtual_reply(SENT, MEAN, 4.0, Demands())]
    model = model_from(build_strategy(study), virtual)
    assert np.allclose(model, model_from(build_strategy(study), single), rtol=1e-6)
    assert not np.allclose(model, SENT)  # it moved


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        ({"name": "median"}, "compares single updates, which secure aggregation hides"),
        ({"name": "qfedavg"}, "compares single updates, which secure aggregation hides"),
        ({"name": "fedbuff"}, "takes answers as they come, and a secure sum is over all of one round"),
    ],
)
def test_a_strategy_that_a_sum_does_not_suffice_is_refused_with_the_alternatives(
    strategy: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        require_sum_suffices(classes_study(strategy=strategy, secure_aggregation={"mode": "msa1"}))
    assert why in str(refused.value)
    assert "choose fedavg, fedprox" in str(refused.value)


@pytest.mark.parametrize(
    ("strategy", "mode"), [({"name": "median"}, "none"), ({"name": "fedbuff"}, "none"), ({"name": "scaffold"}, "msa1")]
)
def test_every_strategy_runs_in_clear_and_those_of_the_mean_under_secure_aggregation(
    strategy: dict[str, Any], mode: str
) -> None:
    training = {"optimizer": "sgd", "learning_rate": 0.1}
    require_sum_suffices(classes_study(strategy=strategy, training=training, secure_aggregation={"mode": mode}))


def roster_of(sites: int) -> Roster:
    return make_roster("c", 1, [Member(i, f"s{i}", i.to_bytes(32, "big")) for i in range(1, sites + 1)])


CLIENT_LEVEL = {"mode": "client-level", "epsilon": 50, "delta": 1e-2, "clip_norm": 2.0, "noise_multiplier": 1.0}


def summed_over(sites_per_round: int | None, *, mode: str = "msa1", private: bool = True) -> Study:
    rounds = {"count": 2, "minimum_sites": 2, "sites_per_round": sites_per_round}
    return classes_study(
        rounds=rounds, secure_aggregation={"mode": mode}, privacy=CLIENT_LEVEL if private else {"mode": "none"}
    )


@pytest.mark.parametrize(("sites", "drawn"), [(3, None), (128, None), (129, 128), (300, 128), (9, 5), (9, 300)])
def test_rounds_of_as_many_sites_as_a_secure_sum_is_over_are_taken(sites: int, drawn: int | None) -> None:
    require_sums_come_about(summed_over(drawn), roster_of(sites))


@pytest.mark.parametrize(
    ("sites", "drawn", "words"),
    [
        (
            129,
            None,
            "would ask 129 of the consortium's 129 sites, .* over 65 to 128: set .*sites_per_round: 128 or fewer",
        ),
        (300, 129, "would ask 129 of the consortium's 300 sites, .* over 128 to 128: set"),
        (9, 4, "would ask 4 of the consortium's 9 sites, .* over 5 to 128: set .*sites_per_round: 5 or more"),
        (2, None, "over 3 to 128: approve more sites first"),
    ],
)
def test_rounds_of_more_or_fewer_sites_than_a_secure_sum_is_over_are_refused(
    sites: int, drawn: int | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        require_sums_come_about(summed_over(drawn), roster_of(sites))


@pytest.mark.parametrize(
    ("sites", "drawn", "words"),
    [
        (9, 5, "draws 5 of the consortium's 9 sites, .* choose privacy mode dp-sgd or client-level, or leave it out$"),
        (300, 128, "draws 128 of the consortium's 300 sites, .* choose privacy mode dp-sgd or client-level$"),
        (129, None, "128 or fewer, and choose privacy mode dp-sgd or client-level$"),
    ],
)
def test_without_differential_privacy_sites_are_not_drawn_for_secure_sums(
    sites: int, drawn: int | None, words: str
) -> None:
    # The weights are summed once, over the first round's sites: of two draws too few are in both.
    with pytest.raises(ConfigError, match=words):
        require_sums_come_about(summed_over(drawn, private=False), roster_of(sites))


def test_without_secure_sums_rounds_may_have_any_size() -> None:
    for drawn in (None, 2):
        require_sums_come_about(summed_over(drawn, mode="none", private=False), roster_of(300))
