"""The round loop over scripted sites: who is counted, who is not waited for, and what the model is then."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from scripted import CUT_OFF, Answer, ScriptedGrid, ScriptedSite
from tiny import LOGISTIC_VALUES, classes_study

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Message

from medfl.server import admission as admission_module
from medfl.server import gathering
from medfl.server import rounds as rounds_module
from medfl.server.checkpoint import Checkpoint, CheckpointFolder
from medfl.server.ending import Ending, Result
from medfl.server.reporter import RoundReport, Silent
from medfl.server.rounds import Rounds
from medfl.shared.algorithms.travel import build_study_network, layouts
from medfl.shared.errors import OUTSIDE_HOURS, Code
from medfl.shared.messages import UNKNOWN_STUDY, EvaluateReply, Failure, Kind, ModelRequest, TrainReply
from medfl.shared.study import Study
from medfl.shared.weights import Flat


@dataclass
class Heard(Silent):
    reports: list[RoundReport] = field(default_factory=list)
    refusals: list[dict[str, str]] = field(default_factory=list)
    on_round: Callable[[RoundReport], None] = lambda report: None

    def waiting(self, *arguments: Any) -> None:
        self.refusals.append(dict(arguments[3]))

    def gathered(self, refusals: Mapping[str, str]) -> None:
        self.refusals.append(dict(refusals))

    def finished_round(self, report: RoundReport) -> None:
        self.reports.append(report)
        self.on_round(report)

    def outcomes(self, number: int) -> dict[str, str]:
        return dict(self.reports[number - 1].outcomes)


def run(
    study: Study,
    grid: ScriptedGrid,
    *,
    heard: Heard | None = None,
    checkpoints: CheckpointFolder | None = None,
    stop: Event | None = None,
) -> Result:
    heard = heard or Heard()
    return Rounds(study, grid, grid, checkpoints=checkpoints, reporter=heard, stop=stop or Event()).run()


def start_of(study: Study) -> Flat:
    network = build_study_network(study)
    return layouts(study, network)[0].flatten(network.state_dict())


def moved(study: Study, result: Result) -> float:
    """How far every weight has moved, the same for all."""
    step = result.weights.astype(np.float64) - start_of(study)
    assert step.max() - step.min() < 1e-5
    return float(step.mean())


AVERAGED = {
    "averaged": classes_study(rounds={"count": 4, "average_last": 3}),
    "moving": classes_study(rounds={"count": 4, "average_decay": 0.5}),
}


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_SETTLE_S", 0.2)
    monkeypatch.setattr(gathering, "_POLL_S", 0.01)
    monkeypatch.setattr(rounds_module, "_VOID_S", 0.01)


def failing(code: Code, reason: str = "", *, times: int = 10**9) -> Callable[[ModelRequest], Answer]:
    counter = itertools.count()

    def train(request: ModelRequest) -> Answer:
        if next(counter) < times:
            return Failure(code, reason).record()
        return TrainReply(np.full_like(request.weights, 1.0), 1).record()

    return train


class Broken(ScriptedSite):
    """Trains by the given function."""

    def __init__(self, train: Callable[[ModelRequest], Answer]) -> None:
        super().__init__()
        self._do = train

    def train(self, request: ModelRequest) -> Answer:
        return self._do(request)


def test_each_round_moves_the_model_by_the_weighted_mean_update() -> None:
    study, heard = classes_study(rounds={"count": 3}), Heard()
    result = run(study, ScriptedGrid({"a": ScriptedSite(1.0, 1), "b": ScriptedSite(5.0, 3)}), heard=heard)
    assert (result.ending, result.round) == (Ending.DONE, 3)
    assert moved(study, result) == pytest.approx(3 * 4.0, rel=1e-6)
    assert [report.round for report in heard.reports] == [1, 2, 3]
    assert heard.outcomes(1) == {"a": "trained", "b": "trained"}
    assert heard.reports[0].received_bytes == 2 * 4 * LOGISTIC_VALUES


def test_every_message_lives_no_longer_than_its_stage() -> None:
    grid = ScriptedGrid({"a": ScriptedSite(), "b": ScriptedSite()})
    run(classes_study(rounds={"deadline_s": 17}), grid)
    assert set(grid.times_to_live) == {17.0}


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "trimmed-mean", "median", "krum"])
def test_the_order_of_arrival_does_not_change_a_bit(strategy: str) -> None:
    more = {"keep": 3} if strategy == "krum" else {}
    study = classes_study(strategy={"name": strategy, **more}, rounds={"minimum_sites": 5})
    draw = np.random.default_rng(0)
    updates = {name: draw.normal(size=LOGISTIC_VALUES).astype(np.float32) for name in "abcde"}

    def weights(arrange: Callable[[list[Message]], list[Message]]) -> bytes:
        sites = {name: ScriptedSite(update, 1 + ord(name) % 7) for name, update in updates.items()}
        return run(study, ScriptedGrid(sites, arrange=arrange)).weights.tobytes()

    shuffled = random.Random(3)
    orders: list[Callable[[list[Message]], list[Message]]] = [
        lambda replies: replies,
        lambda replies: replies[::-1],
        lambda replies: shuffled.sample(replies, len(replies)),
    ]
    assert len({weights(order) for order in orders}) == 1


@pytest.mark.parametrize("strategy", ["trimmed-mean", "median", "krum"])
def test_a_single_wild_update_does_not_move_a_robust_strategy(strategy: str) -> None:
    study = classes_study(strategy={"name": strategy}, rounds={"count": 1, "minimum_sites": 5})
    sites = {name: ScriptedSite(update) for name, update in zip("abcde", [1.0, 1.0, 1.0, 1.0, 1e6], strict=True)}
    assert moved(study, run(study, ScriptedGrid(sites))) == pytest.approx(1.0, rel=1e-5)


def test_krum_tells_small_updates_apart_on_large_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    study = classes_study(strategy={"name": "krum", "malicious": 1}, rounds={"count": 1, "minimum_sites": 5})
    grid = ScriptedGrid(
        {name: ScriptedSite(update) for name, update in zip("abcde", [0.05, 1e-3, 1.1e-3, 1.2e-3, 1.3e-3], strict=True)}
    )
    run_ = Rounds(study, grid, grid, checkpoints=None, reporter=Heard(), stop=Event())
    run_._weights = np.full(LOGISTIC_VALUES, 1000.0, np.float32)
    # squared distances between weights of 1000 are below what float32 resolves; between updates they are not
    taken = run_.run().weights - np.float32(1000)
    assert taken.max() < 0.01


BAD: dict[str, Callable[[ModelRequest], Answer]] = {
    "refused: policy": failing(Code.REFUSED, "policy"),
    "training": failing(Code.TRAINING),
    "wrong length": lambda r: TrainReply(r.weights[:-1], 1).record(),
    "not finite": lambda r: TrainReply(np.full_like(r.weights, np.nan), 1).record(),
    "too large": lambda r: TrainReply(np.full_like(r.weights, 1e30), 1).record(),
    "no weight": lambda r: TrainReply(r.weights, 0).record(),
    "wrong kind": lambda r: EvaluateReply().record(),
    "strange tally": lambda r: TrainReply(r.weights, 1, {"confusion/x": 1.0}).record(),
    "silence": lambda r: None,
}


@pytest.mark.parametrize("what", BAD)
def test_a_site_that_does_not_deliver_is_left_out_and_the_rest_goes_on(what: str) -> None:
    study, heard = classes_study(rounds={"count": 2, "deadline_s": 0.2}), Heard()
    sites = {"a": ScriptedSite(1.0), "b": ScriptedSite(3.0), "bad": Broken(BAD[what])}
    result = run(study, ScriptedGrid(sites), heard=heard)
    assert (result.ending, result.round) == (Ending.DONE, 2)
    assert moved(study, result) == pytest.approx(2 * 2.0, rel=1e-6)
    told = heard.outcomes(1)["bad"]
    assert told == {"refused: policy": what, "training": what, "silence": "no answer"}.get(what, "malformed reply")


def test_an_evaluation_that_is_not_the_studys_is_thrown_away() -> None:
    class Strange(ScriptedSite):
        def evaluate(self, request: ModelRequest) -> Answer:
            return EvaluateReply({"confusion/x": 1.0, "examples": 3.0, "tp/y": 1.0}).record()

    class Honest(ScriptedSite):
        def evaluate(self, request: ModelRequest) -> Answer:
            matrix = {f"confusion/{t}/{p}": float(t == p) for t in ("no", "yes") for p in ("no", "yes")}
            return EvaluateReply({"loss": 1.0, "examples": 2.0, **matrix}).record()

    heard = Heard()
    run(classes_study(rounds={"count": 1}), ScriptedGrid({"a": Strange(), "b": Honest()}), heard=heard)
    assert heard.reports[0].scores == {"loss": 0.5, "accuracy": 1.0, "balanced_accuracy": 1.0}
    assert list(heard.reports[0].site_scores) == ["b"]


def test_the_same_reply_twice_counts_once() -> None:
    study = classes_study(rounds={"count": 1})
    twice = Broken(lambda r: [TrainReply(np.full_like(r.weights, 9.0), 1).record()] * 2)
    result = run(study, ScriptedGrid({"a": ScriptedSite(1.0), "b": twice}))
    assert moved(study, result) == pytest.approx((1 + 9) / 2, rel=1e-6)


def test_a_site_that_is_too_late_is_not_waited_for_and_not_counted() -> None:
    study, heard = classes_study(rounds={"count": 2, "deadline_s": 0.3}), Heard()
    late = ScriptedSite(100.0)
    grid = ScriptedGrid({"a": ScriptedSite(1.0), "b": ScriptedSite(1.0), "late": late})

    def accept_then_dawdle(report: RoundReport | None = None) -> None:
        late.late_s = 60.0

    late_consider = late.consider

    def consider(content: Any) -> Answer:
        accept_then_dawdle()
        return late_consider(content)

    late.consider = consider  # type: ignore[method-assign]
    begin = time.monotonic()
    result = run(study, grid, heard=heard)
    assert time.monotonic() - begin < 50  # nobody waits for the minute it takes
    assert moved(study, result) == pytest.approx(2.0, rel=1e-6)


def test_a_void_round_changes_nothing_and_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    study, heard = classes_study(rounds={"count": 2}), Heard()
    sometimes = Broken(failing(Code.TRAINING, times=2))
    first = ScriptedSite(1.0)
    result = run(study, ScriptedGrid({"a": first, "b": sometimes}), heard=heard)
    assert (result.ending, result.round) == (Ending.DONE, 2)
    assert first.rounds == [1, 1, 1, 2]
    assert all(np.array_equal(seen, first.seen[0]) for seen in first.seen[:3])
    assert moved(study, result) == pytest.approx(2.0, rel=1e-6)
    assert "round 1 is void: 1 of 2 sites trained (b: training)" in caplog.text


def test_five_void_rounds_in_a_row_end_the_study() -> None:
    study = classes_study()
    site = Broken(failing(Code.TRAINING))
    result = run(study, ScriptedGrid({"a": ScriptedSite(1.0), "b": site}))
    assert (result.ending, result.round) == (Ending.VOID_ROUNDS, 0)
    assert site.rounds == [1] * 5
    assert np.array_equal(result.weights, start_of(study))


def test_a_study_waits_for_its_quorum_no_longer_than_its_patience() -> None:
    grid = ScriptedGrid({"a": ScriptedSite(), "b": ScriptedSite()})
    grid.offline = {"b"}
    began = time.monotonic()
    result = run(classes_study(rounds={"patience_s": 0.3}), grid)
    assert (result.ending, result.round) == (Ending.NO_QUORUM, 0)
    assert 0.3 <= time.monotonic() - began < 30


def test_a_refusing_site_is_told_with_its_reason_while_the_quorum_is_awaited() -> None:
    class Refusing(ScriptedSite):
        def consider(self, content: Any) -> Answer:
            return Failure(Code.REFUSED, "study not approved").record()

    heard = Heard()
    grid = ScriptedGrid({"a": ScriptedSite(), "b": Refusing()})
    assert run(classes_study(rounds={"patience_s": 0.2}), grid, heard=heard).ending is Ending.NO_QUORUM
    assert heard.refusals[-1] == {"b": "refused: study not approved"}
    assert grid.asked.count(("b", Kind.OFFER.value)) == 1  # not asked again at once
    assert ("b", Kind.TRAIN.value) not in grid.asked


def test_while_rounds_go_on_it_is_told_who_refuses_and_no_longer_once_it_takes_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission_module, "_ASK_AGAIN_S", (0.0, 0.0))

    class Late(ScriptedSite):
        def consider(self, content: Any) -> Answer:
            if len(heard.reports) < 2:
                return Failure(Code.REFUSED, "study not approved").record()
            return super().consider(content)

    heard = Heard()
    grid = ScriptedGrid({"a": ScriptedSite(), "b": ScriptedSite(), "late": Late()})
    run(classes_study(rounds={"count": 4}), grid, heard=heard)
    assert heard.refusals[0] == {"late": "refused: study not approved"}
    assert heard.refusals[-1] == {}
    assert heard.outcomes(4)["late"] == "trained"


def test_a_site_that_joins_late_takes_part_from_the_next_round() -> None:
    study = classes_study(rounds={"count": 3})
    late = ScriptedSite(1.0)
    grid = ScriptedGrid({"a": ScriptedSite(1.0), "b": ScriptedSite(1.0), "late": late})
    grid.offline = {"late"}
    heard = Heard(on_round=lambda report: grid.offline.clear())
    run(study, grid, heard=heard)
    assert late.rounds == [2, 3]
    assert "late" not in heard.outcomes(1)


def test_a_site_that_leaves_is_not_asked_any_more() -> None:
    study = classes_study(rounds={"count": 2})
    grid = ScriptedGrid({name: ScriptedSite(1.0) for name in ("a", "b", "gone")})
    heard = Heard(on_round=lambda report: grid.offline.add("gone"))
    run(study, grid, heard=heard)
    assert set(heard.outcomes(2)) == {"a", "b"}


@pytest.mark.parametrize(("code", "why"), [(Code.PROTOCOL, UNKNOWN_STUDY), (Code.REFUSED, OUTSIDE_HOURS)])
def test_a_site_that_forgot_the_study_or_does_not_work_at_this_hour_is_offered_it_again(code: Code, why: str) -> None:
    study = classes_study(rounds={"count": 2})
    forgetful = Broken(failing(code, why, times=1))
    grid = ScriptedGrid({"a": ScriptedSite(1.0), "b": ScriptedSite(1.0), "c": forgetful})
    heard = Heard()
    run(study, grid, heard=heard)
    assert heard.outcomes(1)["c"] == f"{code.value}: {why}"
    assert heard.outcomes(2)["c"] == "trained"
    of_c = [kind for name, kind in grid.asked if name == "c"]
    assert of_c.count(Kind.OFFER.value) == 2


def test_a_part_of_the_sites_is_drawn_for_each_round_by_the_seed() -> None:
    def drawn(seed: int) -> list[frozenset[str]]:
        study, heard = classes_study(rounds={"count": 6, "sites_per_round": 2}, seed=seed), Heard()
        run(study, ScriptedGrid({name: ScriptedSite(1.0) for name in "abcd"}), heard=heard)
        return [frozenset(report.outcomes) for report in heard.reports]

    assert drawn(1) == drawn(1)
    assert all(len(cohort) == 2 for cohort in drawn(1))
    assert len(set(drawn(1))) > 1
    assert drawn(1) != drawn(2)


def test_stop_ends_between_rounds() -> None:
    stop = Event()
    heard = Heard(on_round=lambda report: stop.set())
    grid = ScriptedGrid({"a": ScriptedSite(1.0), "b": ScriptedSite(1.0)})
    result = run(classes_study(rounds={"count": 9}), grid, heard=heard, stop=stop)
    assert (result.ending, result.round) == (Ending.STOPPED, 1)


def test_stop_ends_a_stage_that_waits_for_a_silent_site_keeps_the_model_and_warns_of_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    study, stop = classes_study(rounds={"deadline_s": 60}), Event()
    silent = Broken(lambda r: None)
    Thread(target=lambda: (time.sleep(0.3), stop.set()), daemon=True).start()
    began = time.monotonic()
    result = run(study, ScriptedGrid({"a": ScriptedSite(1.0), "b": silent}), stop=stop)
    assert time.monotonic() - began < 30  # of a deadline of 60
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []
    assert (result.ending, result.round) == (Ending.STOPPED, 0)
    assert np.array_equal(result.weights, start_of(study))


def test_scores_are_asked_for_every_few_rounds_and_after_the_last() -> None:
    grid = ScriptedGrid({"a": ScriptedSite(), "b": ScriptedSite()})
    run(classes_study(rounds={"count": 5, "evaluate_every": 2}), grid)
    kinds = [kind for name, kind in grid.asked if name == "a" and kind != Kind.OFFER.value]
    assert [n for n, kind in enumerate(kinds) if kind == Kind.EVALUATE.value] == [2, 5, 7]  # after rounds 2, 4 and 5


class Scoring(ScriptedSite):
    """Cannot score the model at first, then with one right image."""

    def __init__(self, *, fails: int) -> None:
        super().__init__()
        self.fails, self.scored = fails, 0

    def evaluate(self, request: ModelRequest) -> Answer:
        self.scored += 1
        if self.scored <= self.fails:
            return Failure(Code.TRAINING, "").record()
        matrix = {f"confusion/{t}/{p}": float(t == p == "yes") for t in ("no", "yes") for p in ("no", "yes")}
        return EvaluateReply({"loss": 1.0, "examples": 1.0, **matrix}).record()


@pytest.mark.parametrize(("fails", "asked", "scored"), [(0, 2, True), (3, 4, True), (9, 4, False)])
def test_scores_that_nobody_gave_are_asked_for_again_after_the_last_round_only(
    fails: int, asked: int, scored: bool
) -> None:
    sites, heard = {"a": Scoring(fails=fails), "b": Scoring(fails=fails)}, Heard()
    result = run(classes_study(rounds={"count": 2}), ScriptedGrid(sites), heard=heard)
    assert (result.ending, [report.round for report in heard.reports]) == (Ending.DONE, [1, 2])
    assert sites["a"].scored == asked  # once after the first round, at most three times after the last
    assert ("accuracy" in heard.reports[-1].scores) is scored


def test_a_study_that_is_stopped_while_its_last_round_is_scored_is_done_and_asks_nobody_again() -> None:
    stop = Event()

    class Stopping(Scoring):
        def evaluate(self, request: ModelRequest) -> Answer:
            stop.set()
            return super().evaluate(request)

    sites = {"a": Stopping(fails=9), "b": Stopping(fails=9)}
    result = run(classes_study(rounds={"count": 1}), ScriptedGrid(sites), stop=stop)
    assert (result.ending, sites["a"].scored) == (Ending.DONE, 1)


def test_a_site_that_keeps_its_scores_is_not_asked_again() -> None:
    grid = ScriptedGrid({"a": ScriptedSite(), "b": ScriptedSite()})
    run(classes_study(rounds={"count": 1}), grid)
    assert grid.asked.count(("a", Kind.EVALUATE.value)) == 1


def test_a_study_whose_sites_all_leave_before_its_last_scores_is_done() -> None:
    class Leaving(Scoring):
        def evaluate(self, request: ModelRequest) -> Answer:
            grid.offline |= {"a", "b"}
            return super().evaluate(request)

    grid = ScriptedGrid({"a": Leaving(fails=9), "b": Leaving(fails=9)})
    heard = Heard()
    result = run(classes_study(rounds={"count": 1, "patience_s": 0.3}), grid, heard=heard)
    assert (result.ending, heard.reports[-1].scores) == (Ending.DONE, {})


def test_the_finished_model_is_the_mean_of_the_last_rounds_where_the_study_asks_for_it() -> None:
    # models at 4, 8, 12 and 16 from the start; the last three have the mean 12
    study, scored = classes_study(rounds={"count": 4, "average_last": 3}), []

    class Scoring(ScriptedSite):
        def evaluate(self, request: ModelRequest) -> Answer:
            scored.append(request.weights.copy())
            return super().evaluate(request)

    result = run(study, ScriptedGrid({"a": Scoring(4.0), "b": ScriptedSite(4.0)}))
    assert moved(study, result) == pytest.approx(12.0, rel=1e-6)
    distances = [float((weights - start_of(study)).mean()) for weights in scored]
    assert distances == pytest.approx([4, 8, 12, 12], rel=1e-6)  # the mean is what is scored in the end


def test_the_finished_model_is_the_moving_average_of_all_rounds_where_the_study_asks_for_it() -> None:
    # models at 4, 8 and 12 from the start with weights 1/4, 1/2 and 1: (1 + 4 + 12) / 1.75 = 9.714
    study = classes_study(rounds={"count": 3, "average_decay": 0.5})
    result = run(study, ScriptedGrid({"a": ScriptedSite(4.0), "b": ScriptedSite(4.0)}))
    assert moved(study, result) == pytest.approx(17 / 1.75, rel=1e-6)


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "krum", *AVERAGED])
@pytest.mark.parametrize("after", [1, 3])
def test_a_restarted_coordinator_ends_with_the_very_bits_of_one_that_was_not(
    tmp_path: Path, strategy: str, after: int
) -> None:
    study = AVERAGED.get(strategy) or classes_study(strategy={"name": strategy}, rounds={"count": 4})
    draw = np.random.default_rng(1)
    nudges = {name: draw.normal(size=LOGISTIC_VALUES).astype(np.float32) for name in "abc"}

    def grid() -> ScriptedGrid:
        def site(nudge: Flat) -> Broken:  # depends on the round and on the weights, as training does
            return Broken(lambda r: TrainReply((nudge * r.round - r.weights / 7).astype(np.float32), r.round).record())

        return ScriptedGrid({name: site(nudge) for name, nudge in nudges.items()})

    undisturbed = run(study, grid())
    stop = Event()
    heard = Heard(on_round=lambda report: stop.set() if report.round == after else None)
    first = run(study, grid(), heard=heard, checkpoints=CheckpointFolder(tmp_path), stop=stop)
    assert first.round == after
    heard = Heard()
    second = run(study, grid(), heard=heard, checkpoints=CheckpointFolder(tmp_path))
    assert [report.round for report in heard.reports] == list(range(after + 1, 5))
    assert second.weights.tobytes() == undisturbed.weights.tobytes()


def test_a_finished_study_is_not_run_again(tmp_path: Path) -> None:
    study = classes_study()
    first = run(
        study, ScriptedGrid({"a": ScriptedSite(1.0), "b": ScriptedSite(1.0)}), checkpoints=CheckpointFolder(tmp_path)
    )
    idle = ScriptedGrid({"a": ScriptedSite(1.0), "b": ScriptedSite(1.0)})
    again = run(study, idle, checkpoints=CheckpointFolder(tmp_path))
    assert idle.asked == []
    assert (again.ending, again.round) == (Ending.DONE, study.rounds.count)
    assert np.array_equal(again.weights, first.weights)


def scoring(*values: float) -> ScriptedSite:
    """Trains, and has so many of ten right after each round; the last value stays."""
    left = list(values)

    class Scored(ScriptedSite):
        def evaluate(self, request: ModelRequest) -> Answer:
            right = left.pop(0) if len(left) > 1 else left[0]
            half = {"confusion/no/no": right, "confusion/no/yes": 10 - right}
            tally = {"loss": 1.0, "examples": 20.0, **half, "confusion/yes/yes": right, "confusion/yes/no": 10 - right}
            return EvaluateReply(tally).record()

    return Scored(1.0)


CONVERGING = classes_study(rounds={"count": 9, "converged": {"rounds": 2, "gain": 0.01}})


def test_a_study_ends_when_its_score_has_not_grown_for_as_many_rounds_as_it_says() -> None:
    result = run(CONVERGING, ScriptedGrid({"a": scoring(5, 8, 8), "b": ScriptedSite(1.0)}))
    assert (result.ending, result.round) == (Ending.CONVERGED, 4)


@pytest.mark.parametrize("disk", [True, False])
@pytest.mark.parametrize(("keep", "of_round"), [("best", 2), ("last", 4)])
def test_a_converged_study_hands_out_its_best_model_unless_it_says_the_last(
    tmp_path: Path, keep: str, of_round: int, disk: bool
) -> None:
    study = classes_study(rounds={"count": 9, "converged": {"rounds": 2, "gain": 0.01, "keep": keep}})
    grid = ScriptedGrid({"a": scoring(5, 8, 7), "b": ScriptedSite(1.0)})
    result = run(study, grid, checkpoints=CheckpointFolder(tmp_path) if disk else None)
    assert (result.round, result.of_round) == (4, of_round)
    assert moved(study, result) == pytest.approx(of_round, abs=1e-5)  # every site moves every weight by 1 a round
    assert len(list(tmp_path.glob("best-*"))) == disk


def test_a_best_model_that_was_damaged_is_told_and_the_last_one_stands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def damage(report: RoundReport) -> None:
        if report.round == 4:
            (tmp_path / "best-2.safetensors").write_bytes(b"damaged")

    grid = ScriptedGrid({"a": scoring(5, 8, 7), "b": ScriptedSite(1.0)})
    result = run(CONVERGING, grid, heard=Heard(on_round=damage), checkpoints=CheckpointFolder(tmp_path))
    assert result.of_round == 4
    assert "the best, cannot be read" in caplog.text


@pytest.mark.parametrize("after", [2, 3, 4])
def test_a_restarted_study_converges_in_the_same_round(tmp_path: Path, after: int) -> None:
    stop = Event()
    heard = Heard(on_round=lambda report: stop.set() if report.round == after else None)
    sites = {"a": scoring(5, 8, 8), "b": ScriptedSite(1.0)}
    run(CONVERGING, ScriptedGrid(sites), heard=heard, checkpoints=CheckpointFolder(tmp_path), stop=stop)
    again = run(CONVERGING, ScriptedGrid(sites), checkpoints=CheckpointFolder(tmp_path))
    assert (again.ending, again.round, again.of_round) == (Ending.CONVERGED, 4, 2)
    assert moved(CONVERGING, again) == pytest.approx(2, abs=1e-5)


def test_a_study_ends_when_the_budget_of_too_many_sites_is_spent_and_waits_for_nobody() -> None:
    study = classes_study(rounds={"count": 9, "patience_s": 60})
    spending = itertools.count()

    def train(request: ModelRequest) -> Answer:
        if next(spending) < 2:
            return TrainReply(np.full_like(request.weights, 1.0), 1).record()
        return Failure(Code.REFUSED, "budget").record()

    began, poor = time.monotonic(), Broken(train)
    result = run(study, ScriptedGrid({"a": ScriptedSite(1.0), "b": poor}))
    assert (result.ending, result.round) == (Ending.BUDGET_SPENT, 2)
    assert time.monotonic() - began < 40  # of a patience of 60
    assert poor.rounds == [1, 2, 3]


def test_a_site_whose_budget_is_spent_is_not_asked_again_and_the_others_go_on() -> None:
    study, heard = classes_study(rounds={"count": 3}), Heard()
    poor = Broken(failing(Code.REFUSED, "budget"))
    result = run(study, ScriptedGrid({"a": ScriptedSite(1.0), "b": ScriptedSite(1.0), "poor": poor}), heard=heard)
    assert (result.ending, result.round) == (Ending.DONE, 3)
    assert poor.rounds == [1]
    assert [heard.outcomes(n).get("poor") for n in (1, 2, 3)] == ["refused: budget", None, None]


def test_a_site_that_was_late_takes_part_again_once_it_has_answered_another_offer() -> None:
    study, heard = classes_study(rounds={"count": 3, "deadline_s": 0.3}), Heard()

    class Late(ScriptedSite):
        def train(self, request: ModelRequest) -> Answer:
            return None if request.round == 1 else super().train(request)

    late = Late(1.0)
    grid = ScriptedGrid({"a": ScriptedSite(1.0), "b": ScriptedSite(1.0), "late": late})
    run(study, grid, heard=heard)
    assert [heard.outcomes(n)["late"] for n in (1, 2, 3)] == ["no answer", "trained", "trained"]
    assert [kind for name, kind in grid.asked if name == "late"].count(Kind.OFFER.value) == 2


def test_a_site_that_is_killed_in_a_round_and_comes_back_is_in_that_round_where_it_is_needed() -> None:
    study, heard = classes_study(rounds={"count": 1}), Heard()
    kills = iter([CUT_OFF, CUT_OFF])
    killed = Broken(lambda r: next(kills, TrainReply(np.full_like(r.weights, 3.0), 1).record()))
    result = run(study, ScriptedGrid({"a": ScriptedSite(1.0), "killed": killed}), heard=heard)
    assert heard.outcomes(1) == {"a": "trained", "killed": "trained"}
    assert moved(study, result) == pytest.approx(2.0, rel=1e-6)


def test_sites_that_are_cut_off_void_rounds_but_end_the_study_only_after_its_patience() -> None:
    study, gone = classes_study(rounds={"deadline_s": 0.1, "patience_s": 1.5}), Broken(lambda r: CUT_OFF)
    result = run(study, ScriptedGrid({"a": ScriptedSite(1.0), "b": gone}))
    assert result.ending is Ending.NO_QUORUM
    assert len(gone.rounds) > 5 * 5  # more than five void rounds, each asked five times


def test_after_a_restart_the_sites_of_the_last_round_are_awaited_and_no_others(tmp_path: Path) -> None:
    study, stop = classes_study(rounds={"count": 3}), Event()
    names = ("a", "b", "c", "never")

    def grid() -> ScriptedGrid:
        made = ScriptedGrid({name: ScriptedSite(1.0) for name in names})
        made.offline = {"never"}
        return made

    first = Heard(on_round=lambda report: stop.set())
    run(study, grid(), heard=first, checkpoints=CheckpointFolder(tmp_path), stop=stop)
    later = grid()
    later.offline = {"c", "never"}
    Thread(target=lambda: (time.sleep(0.5), later.offline.discard("c")), daemon=True).start()
    began, heard = time.monotonic(), Heard()
    run(study, later, heard=heard, checkpoints=CheckpointFolder(tmp_path))
    assert sorted(heard.reports[0].outcomes) == ["a", "b", "c"]
    assert time.monotonic() - began < 5


def test_a_round_scored_after_a_restart_is_told_with_what_its_training_told(tmp_path: Path) -> None:
    study, folder = classes_study(rounds={"count": 2}), CheckpointFolder(tmp_path)
    heard, stop = Heard(), Event()
    run(study, ScriptedGrid({"a": scoring(7), "b": ScriptedSite(1.0)}), heard=heard, checkpoints=folder, stop=stop)
    (tmp_path / "evaluated.json").unlink()  # killed between the checkpoint and the scores
    again = Heard()
    run(study, ScriptedGrid({"a": scoring(7), "b": ScriptedSite(1.0)}), heard=again, checkpoints=folder)
    told, retold = heard.reports[-1], again.reports[-1]
    assert (retold.round, retold.outcomes, retold.scores) == (told.round, told.outcomes, told.scores)
    assert retold.received_bytes == told.received_bytes > 0


def test_a_full_disk_holds_the_study_up_and_costs_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rounds_module, "_DISK_S", 0.05)
    study, folder, refusals = classes_study(rounds={"count": 3}), CheckpointFolder(tmp_path), itertools.count()
    save = folder.save

    def full(checkpoint: Checkpoint) -> None:
        if checkpoint.round == 2 and next(refusals) < 3:
            raise OSError(28, "No space left on device")
        save(checkpoint)

    monkeypatch.setattr(folder, "save", full)
    site = ScriptedSite(1.0)
    result = run(study, ScriptedGrid({"a": site, "b": ScriptedSite(1.0)}), checkpoints=folder)
    assert (result.ending, result.round, site.rounds) == (Ending.DONE, 3, [1, 2, 3])
    assert "the checkpoint of round 2 cannot be written" in caplog.text
    assert "free space" in caplog.text


def test_a_study_with_a_full_disk_can_be_stopped_and_goes_on_from_the_round_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, folder, stop = classes_study(rounds={"count": 3}), CheckpointFolder(tmp_path), Event()
    save = folder.save

    def full(checkpoint: Checkpoint) -> None:
        if checkpoint.round == 2:
            Thread(target=lambda: (time.sleep(0.1), stop.set()), daemon=True).start()
            raise OSError(28, "No space left on device")
        save(checkpoint)

    monkeypatch.setattr(folder, "save", full)
    sites = {"a": ScriptedSite(1.0), "b": ScriptedSite(1.0)}
    assert run(study, ScriptedGrid(sites), checkpoints=folder, stop=stop).ending is Ending.STOPPED
    assert CheckpointFolder(tmp_path).load(study).round == 1  # type: ignore[union-attr]
    result = run(study, ScriptedGrid(sites), checkpoints=CheckpointFolder(tmp_path))
    assert (result.ending, result.round) == (Ending.DONE, 3)
    assert moved(study, result) == pytest.approx(3.0, rel=1e-6)


def test_a_stop_while_records_are_compared_ends_the_study_and_waits_for_nobody() -> None:
    study, grid, stop = classes_study(), ScriptedGrid({"a": ScriptedSite(), "b": ScriptedSite()}), Event()

    class Stopped:
        def agree(self, number: int, cohort: dict[int, str], *, quorum: int) -> tuple[dict[int, str], dict[str, str]]:
            stop.set()
            return {}, dict.fromkeys(cohort.values(), "no answer")

    rounds = Rounds(study, grid, grid, checkpoints=None, reporter=Heard(), stop=stop)
    rounds._heads = Stopped()  # type: ignore[assignment]
    outcome: list[Ending] = []
    thread = Thread(target=lambda: outcome.append(rounds.run().ending), daemon=True)
    thread.start()
    thread.join(30)
    assert outcome == [Ending.STOPPED]


def test_void_rounds_in_a_row_come_ever_slower_up_to_one_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds_module, "_VOID_S", 1.0)
    assert [rounds_module._pause_s(n) for n in (1, 2, 3, 4, 5, 6, 9, 10, 1000)] == [1, 1, 1, 2, 4, 8, 60, 60, 60]
