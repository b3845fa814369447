"""Each strategy on a model of two parameters, against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scripted import ScriptedGrid, ScriptedSite
from tiny import classes_study, masks_study

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

from medfl.shared.errors import ConfigError
from medfl.shared.messages import TENSOR, Kind, pack, request_config
from medfl.shared.study import Study
from medfl.strategies.build import Needs, build_strategy, needs_of
from medfl.strategies.state import capture, restore

SINGLE = ["trimmed-mean", "median", "krum"]
SUMS = ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedbn"]


def study_with(strategy: dict[str, Any], **changes: Any) -> Study:
    if strategy["name"] == "fedbn":
        return masks_study(strategy=strategy, model={"name": "unet", "channels": [4, 8], "norm": "group"}, **changes)
    return classes_study(strategy=strategy, rounds={"minimum_sites": 5}, **changes)


def one_round(
    strategy: Strategy, number: int, start: list[float], replies: list[tuple[list[float], int]]
) -> list[float]:
    """What the strategy makes of ``replies`` (weights, examples) to the weights ``start``."""
    grid = ScriptedGrid({str(n): ScriptedSite() for n in range(len(replies))})
    vector = np.array(start, np.float32)
    list(strategy.configure_train(number, pack(vector), request_config("0" * 64, number), grid))
    messages = []
    for weights, examples in replies:
        records = {
            "arrays": pack(np.array(weights, np.float32)),
            "metrics": MetricRecord({"num-examples": examples}),
        }
        messages.append(Message(RecordDict(records), dst_node_id=0, message_type=Kind.TRAIN.value))
    arrays, _ = strategy.aggregate_train(number, messages)
    assert arrays is not None
    return arrays[TENSOR].numpy().astype(np.float32).tolist()  # type: ignore[no-any-return]


def of(**settings: Any) -> Strategy:
    return build_strategy(study_with(settings))


def test_fedavg_is_the_mean_weighted_by_examples() -> None:
    # (1 * 1 + 5 * 3) / 4 = 4; (2 * 1 - 2 * 3) / 4 = -1
    assert one_round(of(name="fedavg"), 1, [0, 0], [([1, 2], 1), ([5, -2], 3)]) == [4.0, -1.0]


def test_the_mean_of_one_reply_is_the_reply_to_the_last_bit() -> None:
    strategy, mean = of(name="fedavg"), np.array([1 / 3, -0.0, 1e-40, 3e38], np.float32)
    made = one_round(strategy, 1, [0, 0, 0, 0], [(mean.tolist(), 7)])
    assert np.array(made, np.float32).tobytes() == mean.tobytes()
    assert made == one_round(FedAvg(min_train_nodes=1, min_available_nodes=1), 1, [0, 0, 0, 0], [(mean.tolist(), 7)])


@pytest.mark.parametrize("name", ["fedprox", "fedbn"])
def test_the_server_half_of_fedprox_and_fedbn_is_fedavg(name: str) -> None:
    assert one_round(of(name=name), 1, [9, 9], [([1, 2], 1), ([5, -2], 3)]) == [4.0, -1.0]


def test_fedavgm_keeps_half_of_the_last_step() -> None:
    strategy = of(name="fedavgm", momentum=0.5, learning_rate=1.0)
    # round 1: step 2, 4 from 0; round 2: the mean moves by 1, 0 and half of the last step is added
    assert one_round(strategy, 1, [0, 0], [([2, 4], 1)]) == [2.0, 4.0]
    assert one_round(strategy, 2, [2, 4], [([3, 4], 1)]) == [2 + 1 + 0.5 * 2, 4 + 0 + 0.5 * 4]


def test_fedavgm_without_momentum_and_half_a_rate_takes_half_a_step() -> None:
    strategy = of(name="fedavgm", momentum=0.0, learning_rate=0.5)
    assert one_round(strategy, 1, [0, 0], [([2, 4], 1)]) == [1.0, 2.0]
    assert one_round(strategy, 2, [1, 2], [([3, 4], 1)]) == [2.0, 3.0]


def adaptive(name: str, **more: float) -> Strategy:
    return of(name=name, learning_rate=0.1, beta_1=0.9, beta_2=0.99, tau=0.5, **more)


def test_fedadam_takes_the_bias_corrected_step() -> None:
    # update 2: m = 0.2, v = 0.04, rate 0.1 * sqrt(1 - 0.99^2) / (1 - 0.9^2), step rate * 0.2 / (0.2 + 0.5)
    # Flower counts its rounds from zero inside, so that the first correction has the exponent 2.
    rate = 0.1 * math.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    assert one_round(adaptive("fedadam"), 1, [1, 0], [([3, 0], 5)]) == pytest.approx([1 + rate * 0.2 / 0.7, 0.0])


def test_fedadagrad_divides_by_the_root_of_all_squares() -> None:
    strategy = adaptive("fedadagrad")
    # update 2: m = 2 (no first momentum), v = 4, step 0.1 * 2 / (2 + 0.5); then update 1: v = 5
    first = one_round(strategy, 1, [1, 0], [([3, 0], 5)])
    assert first == pytest.approx([1 + 0.1 * 2 / 2.5, 0.0])
    second = one_round(strategy, 2, first, [([first[0] + 1, 0], 5)])
    assert second[0] == pytest.approx(first[0] + 0.1 * 1 / (math.sqrt(5) + 0.5), rel=1e-5)


def test_fedyogi_moves_its_second_moment_by_sign() -> None:
    # update 2 from v = 0: v = 0 + 0.01 * 4 * sign(4) = 0.04; m = 0.2
    result = one_round(adaptive("fedyogi"), 1, [1, 0], [([3, 0], 5)])
    assert result == pytest.approx([1 + 0.1 * 0.2 / (0.2 + 0.5), 0.0])


def test_the_trimmed_mean_cuts_the_largest_and_the_smallest() -> None:
    replies = [([value, -value], 1) for value in (0, 1, 2, 3, 1000)]
    assert one_round(of(name="trimmed-mean", trim=0.2), 1, [0, 0], replies) == [2.0, -2.0]


def test_the_median_is_by_coordinate() -> None:
    assert one_round(of(name="median"), 1, [0, 0], [([0, 9], 1), ([1, 5], 1), ([1000, 1], 99)]) == [1.0, 5.0]


CROWD = [([0, 0], 1), ([1, 0], 1), ([0.4, 0], 1), ([0.5, 0], 1), ([100, 100], 1)]
"""Squared distances to the two nearest others: 0.41, 0.61, 0.17, 0.26, and far away."""


def test_krum_takes_the_update_nearest_to_its_neighbours() -> None:
    assert one_round(of(name="krum", malicious=1), 1, [0, 0], CROWD) == [pytest.approx(0.4), 0.0]


def test_multi_krum_averages_the_nearest() -> None:
    assert one_round(of(name="krum", malicious=1, keep=2), 1, [0, 0], CROWD) == [pytest.approx(0.45), 0.0]


@pytest.mark.parametrize("name", [*SUMS, *SINGLE])
def test_a_strategy_that_goes_on_from_its_state_is_bit_for_bit_where_it_would_be(name: str) -> None:
    def replies(weights: list[float], number: int) -> list[tuple[list[float], int]]:
        return [([w + 0.1 * number * (site + 1) for w in weights], site + 1) for site in range(4)]

    through = of(name=name)
    weights = [0.3, -0.7]
    for number in (1, 2, 3):
        weights = one_round(through, number, weights, replies(weights, number))

    before, again = of(name=name), [0.3, -0.7]
    for number in (1, 2):
        again = one_round(before, number, again, replies(again, number))
    after = of(name=name)
    restore(after, {key: array.copy() for key, array in capture(before).items()})
    assert one_round(after, 3, again, replies(again, 3)) == weights


@pytest.mark.parametrize(
    ("name", "kept"),
    [("fedavg", []), ("fedavgm", ["momentum_vector"]), ("fedadam", ["m_t", "v_t"]), ("median", [])],
)
def test_what_a_strategy_carries_is_captured_as_a_copy(name: str, kept: list[str]) -> None:
    strategy = of(name=name)
    assert capture(strategy) == {}
    one_round(strategy, 1, [0, 0], [([1, 2], 1)])
    state = capture(strategy)
    assert sorted(state) == kept
    for array in state.values():
        array[:] = 77
    assert all(array.max() < 77 for array in capture(strategy).values())


def test_a_round_without_enough_answers_leaves_the_state_as_it_was() -> None:
    strategy = of(name="fedavgm")
    one_round(strategy, 1, [0, 0], [([1, 2], 1)])
    before = capture(strategy)
    grid = ScriptedGrid({"a": ScriptedSite()})
    list(strategy.configure_train(2, pack(np.array([5, 5], np.float32)), request_config("0" * 64, 2), grid))
    assert all(np.array_equal(before[key], array) for key, array in capture(strategy).items())


@pytest.mark.parametrize("name", SINGLE)
def test_strategies_that_compare_updates_are_refused_under_secure_aggregation(name: str) -> None:
    study = study_with({"name": name}, secure_aggregation={"mode": "msa1"})
    for refuse in (needs_of, build_strategy):
        with pytest.raises(ConfigError) as caught:
            refuse(study)
        for alternative in (name, *SUMS, "secure_aggregation mode none"):
            assert alternative in str(caught.value)


@pytest.mark.parametrize("name", SUMS)
def test_strategies_of_the_mean_run_under_secure_aggregation(name: str) -> None:
    assert needs_of(study_with({"name": name}, secure_aggregation={"mode": "msa1"})) is Needs.SUM


@pytest.mark.parametrize("name", SINGLE)
def test_strategies_that_compare_updates_say_so(name: str) -> None:
    assert needs_of(study_with({"name": name})) is Needs.SINGLE_UPDATES


def test_a_strategy_takes_every_node_it_is_shown() -> None:
    grid = ScriptedGrid({str(n): ScriptedSite() for n in range(5)})
    for configure in (of(name="fedavg").configure_train, of(name="fedavg").configure_evaluate):
        messages = configure(1, pack(np.zeros(2, np.float32)), request_config("0" * 64, 1), grid)
        assert sorted(message.metadata.dst_node_id for message in messages) == [2, 3, 4, 5, 6]
