"""Every strategy on answers nobody wants: of norm zero, not finite, too short or long, from one site, of odd sizes."""

from __future__ import annotations

from threading import Event
from typing import Any

import numpy as np
import pytest
from scripted import Answer, ScriptedGrid, ScriptedSite
from tiny import LOGISTIC_VALUES, classes_study

from medfl.server import gathering
from medfl.server import rounds as rounds_module
from medfl.server.ending import Ending, Result
from medfl.server.reporter import RoundReport, Silent
from medfl.server.rounds import Rounds
from medfl.shared.algorithms.needs import demands_of
from medfl.shared.algorithms.travel import build_study_network, layouts
from medfl.shared.messages import ModelRequest, TrainReply
from medfl.shared.study import Study
from medfl.shared.weights import Flat

NAMES = [
    "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold", "fednova", "feddyn", "feddc",
    "ditto", "moon", "fedbuff", "qfedavg", "trimmed-mean", "median", "geometric-median", "krum", "bulyan",
]  # fmt: skip
MEANS = ["fedavg", "fedprox", "scaffold", "feddc", "ditto", "moon", "fedbuff"]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_SETTLE_S", 0.0)
    monkeypatch.setattr(rounds_module, "_VOID_ROUNDS", 2)


def study(name: str, minimum_sites: int = 3) -> Study:
    more = {"trim": 0.4} if name == "trimmed-mean" else {}  # of three sites one is cut at each end
    return classes_study(strategy={"name": name, **more}, rounds={"count": 1, "minimum_sites": minimum_sites})


class Says(ScriptedSite):
    """Answers with ``update`` and what its strategy sends beside it, and releases its loss."""

    def train(self, request: ModelRequest) -> Answer:
        assert isinstance(self.update, np.ndarray)
        tally = {"loss": 2.0 * self.examples, "examples": float(self.examples)}
        return TrainReply(self.update, self.examples, tally).record()


def answer(made: Study, step: float, *, examples: int = 4, more: int = 0) -> Says:
    """A site whose every value moves by ``step``; ``more`` values too many."""
    beside = demands_of(made.strategy).beside.up(LOGISTIC_VALUES)
    vector = np.full(LOGISTIC_VALUES + beside + more, step, np.float32)
    vector[LOGISTIC_VALUES : LOGISTIC_VALUES + beside] = 0.001 if beside == 1 else 0.0  # one step of work; no change
    return Says(vector, examples)


class Heard(Silent):
    def __init__(self) -> None:
        self.reports: list[RoundReport] = []

    def finished_round(self, report: RoundReport) -> None:
        self.reports.append(report)


def run(made: Study, sites: list[ScriptedSite]) -> tuple[Result, dict[str, str]]:
    grid, heard = ScriptedGrid({f"s{number}": site for number, site in enumerate(sites)}), Heard()
    result = Rounds(made, grid, grid, checkpoints=None, reporter=heard, stop=Event()).run()
    return result, dict(heard.reports[0].outcomes) if heard.reports else {}


def moves(made: Study, result: Result) -> Flat:
    network = build_study_network(made)
    start: Flat = layouts(made, network)[0].flatten(network.state_dict())
    return result.weights - start


@pytest.mark.parametrize("name", NAMES)
def test_updates_of_length_zero_leave_the_model_where_it_is(name: str) -> None:
    made = study(name)
    result, _ = run(made, [answer(made, 0.0) for _ in range(4)])
    assert result.ending is Ending.DONE
    assert np.abs(moves(made, result)).max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["nan", "inf", "short", "long", "empty"])
def test_a_damaged_answer_is_thrown_away_and_named_and_the_others_make_the_model(name: str, damage: str) -> None:
    made = study(name)
    bad = answer(made, 1.0, more={"short": -1, "long": 1}.get(damage, 0))
    assert isinstance(bad.update, np.ndarray)
    bad.update[:1] = {"nan": np.nan, "inf": np.inf}.get(damage, 1.0)
    if damage == "empty":
        bad.update = bad.update[:0]
    result, outcomes = run(made, [bad, *(answer(made, 0.25) for _ in range(3))])
    # who answers after enough others have is not waited for by fedbuff
    assert outcomes["s0"] in ({"malformed reply", "still training"} if name == "fedbuff" else {"malformed reply"})
    assert result.ending is Ending.DONE
    assert np.isfinite(result.weights).all()
    if name == "feddyn":  # which moves by the share of all sites that answered
        return
    without, _ = run(made, [answer(made, 0.25) for _ in range(3)])
    assert np.allclose(result.weights, without.weights, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_where_all_answers_are_damaged_the_round_is_void_and_the_model_stays(name: str) -> None:
    made = study(name)
    result, _ = run(made, [answer(made, float("nan")) for _ in range(3)])
    assert (result.ending, result.round) == (Ending.VOID_ROUNDS, 0)
    assert not moves(made, result).any()


@pytest.mark.parametrize("name", NAMES)
def test_one_site_alone_is_a_federation_too(name: str) -> None:
    made = study(name, minimum_sites=3 if name in ("bulyan", "trimmed-mean") else 1)  # refused with fewer
    result, outcomes = run(made, [answer(made, 0.5) for _ in range(made.rounds.minimum_sites)])
    assert result.ending is Ending.DONE
    assert set(outcomes.values()) == {"trained"}
    step = moves(made, result)
    assert np.isfinite(step).all()
    assert (step > 0).all()  # in the direction of all, whatever the server's own learning rate


@pytest.mark.parametrize("name", MEANS)
def test_a_site_of_a_million_images_beside_one_of_one_is_weighed_exactly(name: str) -> None:
    made = study(name, minimum_sites=2)
    result, _ = run(made, [answer(made, 1.0, examples=1), answer(made, 0.5, examples=999_999)])
    assert moves(made, result) == pytest.approx(np.full(LOGISTIC_VALUES, 0.5 + 0.5e-6), abs=1e-6)


def test_robust_rules_count_sites_and_not_images() -> None:
    for name in ("median", "trimmed-mean"):
        made = study(name)
        sizes: list[Any] = [(0.0, 1_000_000), (0.25, 1), (0.25, 1), (0.25, 1), (0.5, 1)]
        result, _ = run(made, [answer(made, step, examples=count) for step, count in sizes])
        assert moves(made, result) == pytest.approx(np.full(LOGISTIC_VALUES, 0.25), abs=1e-6)
