"""Safeguards: long updates are shortened, sudden steps too, and a model whose score falls is taken back."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scripted import Answer, ScriptedGrid, ScriptedSite
from tiny import LOGISTIC_VALUES, classes_study

from medfl.server import gathering
from medfl.server.checkpoint import CheckpointFolder
from medfl.server.ending import Result
from medfl.server.reporter import RoundReport, Silent
from medfl.server.rounds import Rounds
from medfl.server.safeguards import Watch, length_of, shortened
from medfl.shared.algorithms.travel import build_study_network, layouts
from medfl.shared.messages import EvaluateReply, ModelRequest, TrainReply
from medfl.shared.safeguards import Safeguards
from medfl.shared.study import Study
from medfl.shared.weights import Flat

ROOT_N = LOGISTIC_VALUES**0.5


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_SETTLE_S", 0.0)


def vector(*values: float) -> Flat:
    return np.array(values, np.float32)


def guarded(safeguards: dict[str, float], **changes: Any) -> Study:
    return classes_study(safeguards=safeguards, **changes)


class Heard(Silent):
    def __init__(self) -> None:
        self.reports: list[RoundReport] = []

    def finished_round(self, report: RoundReport) -> None:
        self.reports.append(report)


def run(study: Study, sites: dict[str, ScriptedSite], folder: Path | None = None) -> tuple[Result, list[RoundReport]]:
    grid, heard = ScriptedGrid(sites), Heard()
    checkpoints = None if folder is None else CheckpointFolder(folder)
    result = Rounds(study, grid, grid, checkpoints=checkpoints, reporter=heard, stop=Event()).run()
    return result, heard.reports


def start_of(study: Study) -> Flat:
    network = build_study_network(study)
    return layouts(study, network)[0].flatten(network.state_dict())


def moved(study: Study, result: Result) -> float:
    """How far every weight has moved, the same for all."""
    step = result.weights.astype(np.float64) - start_of(study)
    assert step.max() - step.min() < 1e-5
    return float(step.mean())


def test_an_update_of_norm_0_stays_as_it_is_and_one_of_norm_10_becomes_half_as_long() -> None:
    limit = Safeguards(max_norm=5.0)
    assert shortened(vector(0, 0), limit, length=2, whose="a").tolist() == [0.0, 0.0]
    assert shortened(vector(3, 4), limit, length=2, whose="a").tolist() == [3.0, 4.0]
    assert shortened(vector(6, 8, 77), limit, length=2, whose="a").tolist() == [3.0, 4.0, 77.0]
    assert shortened(vector(6, 8), Safeguards(), length=2, whose="a").tolist() == [6.0, 8.0]


def test_lengths_beyond_float32_are_finite() -> None:
    assert length_of(vector(3e30, 4e30)) == pytest.approx(5e30, rel=1e-6)


@pytest.mark.parametrize("strategy", ["fedavg", "median", "fednova"])
def test_one_site_cannot_pull_the_model_further_than_the_norm_allows(strategy: str) -> None:
    study = guarded({"max_norm": ROOT_N}, strategy={"name": strategy}, rounds={"count": 1, "minimum_sites": 3})
    beside = [0.001] if strategy == "fednova" else []  # one step of work
    liar = np.append(np.full(LOGISTIC_VALUES, 1000.0), beside).astype(np.float32)
    honest = np.append(np.full(LOGISTIC_VALUES, 0.5), beside).astype(np.float32)
    result, _ = run(study, {"a": ScriptedSite(honest), "b": ScriptedSite(honest), "c": ScriptedSite(liar)})
    expected = {"fedavg": 2 / 3, "fednova": 2 / 3, "median": 0.5}  # (0.5 + 0.5 + 1) / 3
    assert moved(study, result) == pytest.approx(expected[strategy], rel=1e-4)


class Growing(ScriptedSite):
    """Each round's update is ten times the last one's."""

    def train(self, request: ModelRequest) -> Answer:
        return TrainReply(np.full_like(request.weights, 0.1 * 10.0**request.round), 1).record()


def test_a_step_may_grow_only_so_much_over_the_median_of_the_last_ones() -> None:
    study = guarded({"max_growth": 2.0}, rounds={"count": 3})
    result, _ = run(study, {"a": Growing(), "b": Growing()})
    # steps 1, then 2 of 10, then twice the median 1.5 of 1 and 2
    assert moved(study, result) == pytest.approx(1 + 2 + 3, rel=1e-5)


def test_the_first_step_and_steps_after_none_at_all_are_free() -> None:
    watch = Watch(Safeguards(max_growth=2.0))
    assert watch.step(vector(0), vector(0)).tolist() == [0.0]
    assert watch.step(vector(0), vector(7)).tolist() == [7.0]


class Scored(ScriptedSite):
    """Moves by 1 a round and by 100 in round ``poisoned``; is right ``10 + moves`` times of 20, never beyond 10."""

    def __init__(self, study: Study, poisoned: int, *, killed_in: int = 0) -> None:
        super().__init__()
        self.start, self.poisoned, self.killed_in = start_of(study), poisoned, killed_in

    def train(self, request: ModelRequest) -> Answer:
        step = 100.0 if request.round == self.poisoned else 1.0
        return TrainReply(np.full_like(request.weights, step), 1).record()

    def evaluate(self, request: ModelRequest) -> Answer:
        if request.round == self.killed_in:
            raise KeyboardInterrupt
        move = round(float((request.weights - self.start).mean()))
        right = float(10 + move if move <= 10 else 0)
        names = {"loss": 1.0, "examples": 20.0}
        cells = {"no/no": right / 2, "no/yes": 10 - right / 2, "yes/no": 10 - right / 2, "yes/yes": right / 2}
        return EvaluateReply(names | {f"confusion/{name}": value for name, value in cells.items()}).record()


def falling(**changes: Any) -> Study:
    return guarded({"max_fall": 0.1}, rounds={"count": 4}, **changes)


def test_a_model_whose_score_falls_is_taken_back_and_training_goes_on_from_the_last_good_one() -> None:
    study = falling()
    result, reports = run(study, {name: Scored(study, poisoned=3) for name in "ab"})
    assert [report.scores["balanced_accuracy"] for report in reports] == pytest.approx([0.55, 0.6, 0.0, 0.65])
    assert [report.note for report in reports] == ["", "", "taken back: balanced_accuracy 0.000 after 0.600", ""]
    assert moved(study, result) == pytest.approx(3.0)
    unguarded = classes_study(rounds={"count": 4})
    assert moved(unguarded, run(unguarded, {n: Scored(study, poisoned=3) for n in "ab"})[0]) == pytest.approx(103.0)


def test_the_memory_of_the_strategy_goes_back_with_the_model() -> None:
    study = falling(strategy={"name": "fedavgm", "momentum": 0.5})
    result, _ = run(study, {name: Scored(study, poisoned=3) for name in "ab"})
    # steps 1, 1 + 0.5, (taken back), 1 + 0.75; with the poisoned step in the momentum it would be far more
    assert moved(study, result) == pytest.approx(1 + 1.5 + 1.75, rel=1e-5)


def test_a_coordinator_killed_before_it_scored_a_poisoned_round_takes_it_back_after_its_restart(tmp_path: Path) -> None:
    study = falling()
    with pytest.raises(KeyboardInterrupt):
        run(study, {name: Scored(study, poisoned=3, killed_in=3) for name in "ab"}, tmp_path)
    result, reports = run(study, {name: Scored(study, poisoned=3) for name in "ab"}, tmp_path)
    assert [(report.round, bool(report.note)) for report in reports] == [(3, True), (4, False)]
    assert moved(study, result) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"secure_aggregation": {"mode": "msa1"}}, "sites refuse"),
        (
            {"privacy": {"mode": "dp-sgd", "epsilon": 8, "delta": 1e-5, "clip_norm": 1, "expected_batch": 4}},
            "do not leave under differential privacy",
        ),
        ({"rounds": {"count": 4, "average_last": 2}}, "rounds.average_last"),
        ({"rounds": {"count": 4, "average_decay": 0.9}}, "average_decay"),
        ({"rounds": {"count": 4, "evaluate_every": 2}, "strategy": {"name": "scaffold"}}, "evaluate_every 1"),
    ],
)
def test_a_study_that_cannot_go_back_is_refused_with_the_way_out(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        guarded({"max_fall": 0.1}, **changes)


def test_a_study_without_safeguards_keeps_its_digest() -> None:
    assert b"safeguards" not in classes_study().canonical()
    assert classes_study(safeguards={}).digest == classes_study().digest
