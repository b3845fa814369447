"""Each rule of MedFL's own on a model of two parameters, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scripted import ScriptedGrid, ScriptedSite

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Message, MetricRecord, RecordDict

from medfl.shared.errors import ProtocolError
from medfl.shared.messages import TENSOR, Kind, pack, request_config
from medfl.shared.weights import Flat
from medfl.strategies.bulyan import bulyan, krum_order, nearest_mean
from medfl.strategies.fed_dc import fed_dc
from medfl.strategies.fed_dyn import fed_dyn
from medfl.strategies.fed_nova import fed_nova
from medfl.strategies.geometric_median import geometric_median, smoothed_weiszfeld
from medfl.strategies.q_fed_avg import q_fed_avg
from medfl.strategies.rule import RuleStrategy, Turn, Update
from medfl.strategies.scaffold import scaffold
from medfl.strategies.state import capture, restore


def vector(*values: float) -> Flat:
    return np.array(values, np.float32)


def update(step: Flat, beside: Flat | None = None, *, examples: float = 1, loss: float = float("nan")) -> Update:
    return Update(step, vector() if beside is None else beside, examples, loss)


def test_scaffold_moves_the_control_variate_by_the_share_of_sites_that_took_part() -> None:
    turn = Turn(vector(1, 1), (update(vector(2, -2), vector(4, 8)),), share=0.25)
    model, memory = scaffold(learning_rate=0.5)(turn, {"control": vector(1, 0)})
    assert model.tolist() == [2.0, 0.0]  # 1 + 0.5 * 2, 1 - 0.5 * 2
    assert memory["control"].tolist() == [2.0, 2.0]  # 1 + 4 / 4, 0 + 8 / 4


def test_fednova_takes_the_mean_direction_times_the_mean_work() -> None:
    # sites did 2 and 6 steps and moved 2 and 12: directions 1 and 2, mean 1.5, mean work 4 (FedAvg would move 7)
    turn = Turn(vector(0, 1), (update(vector(1.5, 0), vector(4 / 1000)),))
    assert fed_nova(turn, {})[0] == pytest.approx([6.0, 1.0])


def test_feddyn_corrects_by_the_memory_of_all_updates() -> None:
    rule = fed_dyn(alpha=0.5)
    # h = -0.5 * 0.5 * 2 = -0.5; model = 0 + 2 + 0.5 / 0.5 = 3
    model, memory = rule(Turn(vector(0), (update(vector(2)),), share=0.5), {})
    assert (model.tolist(), memory["h"].tolist()) == ([3.0], [-0.5])
    # h = -0.5 + 0.25 * 4 = 0.5; model = 3 - 4 - 1 = -2
    model, memory = rule(Turn(model, (update(vector(-4)),), share=0.5), memory)
    assert (model.tolist(), memory["h"].tolist()) == ([-2.0], [0.5])


def test_feddc_takes_the_mean_and_hands_out_the_mean_of_the_updates() -> None:
    model, memory = fed_dc(Turn(vector(1, 1), (update(vector(2, -2), vector(4, 8)),), share=0.5), {})
    assert (model.tolist(), memory["mean-update"].tolist()) == ([3.0, -1.0], [4.0, 8.0])


def test_q_zero_is_the_plain_mean_over_sites() -> None:
    updates = (update(vector(2), loss=9, examples=1), update(vector(4), loss=1, examples=99))
    assert q_fed_avg(q=0, learning_rate=0.1)(Turn(vector(1), updates), {})[0] == pytest.approx([4.0])


def test_q_one_weighs_by_the_loss() -> None:
    # L = 1; deltas 4 * 1 and 1 * 3, h = 1 + 4 and 9 + 1: step 7 / 15
    updates = (update(vector(1), loss=4), update(vector(3), loss=1))
    assert q_fed_avg(q=1, learning_rate=1)(Turn(vector(0), updates), {})[0] == pytest.approx([7 / 15])


def test_qfedavg_says_that_it_needs_every_loss() -> None:
    with pytest.raises(ProtocolError, match="use fedavg"):
        q_fed_avg(q=1, learning_rate=1)(Turn(vector(0), (update(vector(1)),)), {})


def test_the_geometric_median_of_a_line_is_its_middle_point_however_far_the_last_one_is() -> None:
    points = [vector(0, 0), vector(1, 0), vector(1e4, 0)]
    assert smoothed_weiszfeld(points, [1, 1, 1], 100) == pytest.approx([1.0, 0.0], abs=1e-2)


def test_the_geometric_median_of_a_triangle_sees_each_side_under_120_degrees() -> None:
    # Fermat's point of the equilateral triangle is its centre; of weights 1, 1, 3 it is the heavy corner
    corners = [vector(0, 0), vector(2, 0), vector(1, 3**0.5)]
    assert smoothed_weiszfeld(corners, [1, 1, 1], 50) == pytest.approx([1.0, 3**-0.5], abs=1e-4)
    assert smoothed_weiszfeld(corners, [1, 1, 3], 200) == pytest.approx([1.0, 3**0.5], abs=1e-3)


def test_one_update_is_its_own_geometric_median() -> None:
    turn = Turn(vector(1, 1), (update(vector(0, 0)),))
    assert geometric_median(iterations=3)(turn, {})[0].tolist() == [1.0, 1.0]


def test_krum_takes_one_after_the_other() -> None:
    # on a line at 0, 1, 2, 3, 100, one liar: two neighbours each, squared 5, 2, 2, 5, far; then among 0, 2, 3, 100
    # one neighbour each, 4, 1, 1, far; then among 0, 3, 100 one, 9, 9, far
    assert krum_order([vector(v) for v in (0, 1, 2, 3, 100)], 1)[:3] == [1, 2, 0]


def test_the_values_nearest_to_the_median_are_averaged_by_coordinate() -> None:
    # medians 2 and 5: nearest three 1, 2, 3 and 4, 5, 5.5
    points = [vector(1, 5.5), vector(2, 5), vector(3, 4), vector(9, 0), vector(-8, 90)]
    assert nearest_mean(points, 3) == pytest.approx([2.0, 14.5 / 3])


def test_bulyan_leaves_out_the_liar() -> None:
    # of 0..5 and 1000, five are chosen around the middle; of them the mean of the three nearest to their median
    updates = tuple(update(vector(v)) for v in (0, 1, 2, 3, 4, 5, 1000))
    model = bulyan(malicious=1)(Turn(vector(10), updates), {})[0]
    assert 11 <= float(model[0]) <= 14
    with pytest.raises(ProtocolError, match="needs 7 updates against 1, got 3"):
        bulyan(malicious=1)(Turn(vector(10), updates[:3]), {})


def reply(values: Flat, examples: int = 1) -> Message:
    records = {"arrays": pack(values), "metrics": MetricRecord({"num-examples": examples})}
    return Message(RecordDict(records), dst_node_id=0, message_type=Kind.TRAIN.value)


def asked(strategy: RuleStrategy, weights: Flat, sites: int = 2) -> list[Flat]:
    grid = ScriptedGrid({str(n): ScriptedSite() for n in range(sites)})
    messages = strategy.configure_train(1, pack(weights), request_config("0" * 64, 1), grid)
    return [message.content.array_records["arrays"][TENSOR].numpy() for message in messages]


def test_what_scaffold_sends_is_the_model_and_its_control_variate_also_after_a_restart() -> None:
    strategy = RuleStrategy(scaffold(learning_rate=1.0), sends="control")
    assert [sent.tolist() for sent in asked(strategy, vector(1, 2))] == [[1, 2, 0, 0], [1, 2, 0, 0]]
    strategy.aggregate_train(1, [reply(vector(5, 6, 7, 8))])
    again = RuleStrategy(scaffold(learning_rate=1.0), sends="control")
    restore(again, capture(strategy))
    assert asked(again, vector(3, 4))[0].tolist() == [3, 4, 7, 8]


def test_an_update_shorter_than_the_model_is_refused() -> None:
    strategy = RuleStrategy(fed_nova)
    asked(strategy, vector(1, 2))
    with pytest.raises(ProtocolError, match="1 values"):
        strategy.aggregate_train(1, [reply(vector(5))])


def test_a_round_without_replies_makes_no_model() -> None:
    strategy = RuleStrategy(fed_nova)
    asked(strategy, vector(1, 2))
    assert strategy.aggregate_train(1, []) == (None, None)
