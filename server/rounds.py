"""The round loop: who takes part, train, sum, let the strategy decide, evaluate, checkpoint; again until done."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from threading import Event

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from medfl.server.admission import Admission, Directory
from medfl.server.checkpoint import Checkpoint, CheckpointFolder
from medfl.server.cohort import CohortGrid
from medfl.server.exchange import exchange
from medfl.server.reporter import Reporter, RoundReport
from medfl.server.summation import FixedPointSum
from medfl.shared.algorithms.travel import build_study_network, layouts
from medfl.shared.errors import ProtocolError
from medfl.shared.messages import (
    UNKNOWN_STUDY,
    EvaluateReply,
    Failure,
    Kind,
    TrainReply,
    outcome,
    pack,
    request_config,
    unpack,
)
from medfl.shared.metrics import add, read
from medfl.shared.study import Study
from medfl.shared.weights import Flat, Layout
from medfl.strategies.build import Needs, build_strategy, needs_of
from medfl.strategies.state import capture, restore

log = logging.getLogger("medfl.server")

_SETTLE_S = 10.0  # before the first round, sites that are still loading their images are awaited this long
_VOID_ROUNDS = 5  # as many void rounds in a row end the study
_POLL_S = 0.1


class Ending(StrEnum):
    """Why a study ended."""

    DONE = "done"
    STOPPED = "stopped"
    NO_QUORUM = "too few sites took part"
    VOID_ROUNDS = "too many rounds in a row without enough answers"


@dataclass(frozen=True)
class Result:
    """The model a study ended with. ``round`` is the last complete round (0: none)."""

    ending: Ending
    round: int
    weights: Flat
    layout: Layout


@dataclass
class _Answers:
    """What one training stage brought: the mean of all updates, or each one by itself."""

    sum: FixedPointSum
    single: list[Message] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)
    tallies: list[Mapping[str, float]] = field(default_factory=list)
    received_bytes: int = 0


class Rounds:
    """Runs one study over a grid, whichever grid it is."""

    def __init__(
        self,
        study: Study,
        grid: Grid,
        directory: Directory,
        *,
        checkpoints: CheckpointFolder | None,
        reporter: Reporter,
        stop: Event,
        series: int | None = None,
    ) -> None:
        self._study = study
        self._grid = grid
        self._checkpoints = checkpoints
        self._reporter = reporter
        self._stop = stop
        self._series = series
        self._admission = Admission(study, grid, directory)
        self._directory = directory
        self._strategy = build_strategy(study)
        self._needs = needs_of(study)
        network = build_study_network(study)
        self._layout, _ = layouts(study, network)
        self._weights = self._layout.flatten(network.state_dict())
        self._round = 0

    def run(self) -> Result:
        """Run to the study's end, going on from the latest checkpoint where there is one."""
        self._resume()
        study, void, since = self._study, 0, time.monotonic()
        self._reporter.started(study, self._round + 1)
        ending = Ending.DONE
        while self._round < study.rounds.count:
            cohort = self._gather(until=since + study.rounds.patience_s)
            if self._stop.is_set():
                ending = Ending.STOPPED
                break
            if not cohort:
                ending = Ending.NO_QUORUM
                break
            if self._one_round(cohort):
                void, since = 0, time.monotonic()
                continue
            if self._stop.is_set():
                ending = Ending.STOPPED
                break
            void += 1
            if void == _VOID_ROUNDS:
                ending = Ending.VOID_ROUNDS
                break
        self._reporter.ended(ending.value)
        return Result(ending, self._round, self._weights, self._layout)

    def _resume(self) -> None:
        if self._checkpoints is None or (checkpoint := self._checkpoints.load(self._study)) is None:
            return
        self._layout.check(checkpoint.weights)
        self._weights, self._round = checkpoint.weights, checkpoint.round
        restore(self._strategy, checkpoint.strategy)
        log.info("going on after round %d of study %s", self._round, self._study.name)

    def _gather(self, *, until: float) -> dict[int, str]:
        """Wait for a quorum; the sites of the next round, empty when none came in time or the study is stopped."""
        settled = time.monotonic() + (_SETTLE_S if self._round == 0 else 0.0)
        needed = self._study.rounds.minimum_sites
        while not self._stop.is_set():
            self._admission.refresh()
            ready = self._admission.taking_part()
            if len(ready) >= needed and (self._admission.awaited == 0 or time.monotonic() > settled):
                return self._sample(ready)
            online = sorted(self._directory.online().values())
            self._reporter.waiting(online, sorted(ready.values()), needed, self._admission.refusals)
            if time.monotonic() > until:
                break
            self._stop.wait(_POLL_S)
        return {}

    def _sample(self, ready: dict[int, str]) -> dict[int, str]:
        size = self._study.rounds.sites_per_round
        if size is None or size >= len(ready):
            return ready
        drawn = random.Random(f"{self._study.seed}/{self._round}")
        return {node: ready[node] for node in sorted(drawn.sample(sorted(ready), size))}

    def _one_round(self, cohort: dict[int, str]) -> bool:
        """Train, aggregate, evaluate and make durable; False when too few sites answered (nothing has changed then)."""
        number, started = self._round + 1, time.monotonic()
        answers = self._train(number, cohort)
        trained = [name for name, result in answers.outcomes.items() if result == "trained"]
        if len(trained) < self._study.rounds.minimum_sites:
            failed = ", ".join(f"{name}: {why}" for name, why in answers.outcomes.items() if name not in trained)
            log.warning("round %d is void: %d of %d sites trained (%s)", number, len(trained), len(cohort), failed)
            return False
        self._weights = self._aggregate(number, answers)
        scores, site_scores = self._evaluate(number, cohort)
        self._round = number
        if self._checkpoints is not None:
            state = capture(self._strategy)
            self._checkpoints.save(Checkpoint(self._study.digest, number, self._weights, state, self._series))
        report = RoundReport(
            round=number,
            seconds=time.monotonic() - started,
            outcomes=answers.outcomes,
            training=read(add(answers.tallies)),
            scores=scores,
            site_scores=site_scores,
            received_bytes=answers.received_bytes,
        )
        self._reporter.finished_round(report)
        return True

    def _train(self, number: int, cohort: dict[int, str]) -> _Answers:
        config = request_config(self._study.digest, number)
        view = CohortGrid(self._grid, cohort)
        messages = list(self._strategy.configure_train(number, pack(self._weights), config, view))
        answers = _Answers(FixedPointSum(self._layout.length))
        answers.outcomes.update(dict.fromkeys((cohort[m.metadata.dst_node_id] for m in messages), "no answer"))
        done: list[str] = []
        self._reporter.stage(number, "training", done, list(answers.outcomes))
        for reply in exchange(self._grid, messages, deadline_s=self._study.rounds.deadline_s, stop=self._stop):
            name = cohort.get(reply.metadata.src_node_id)
            if name is None or answers.outcomes[name] == "trained":
                continue
            answers.outcomes[name] = self._take(reply, answers)
            done.append(name)
            self._reporter.stage(number, "training", done, list(answers.outcomes))
        return answers

    def _take(self, reply: Message, answers: _Answers) -> str:
        """Add one training reply to ``answers`` and say in a few words what it was."""
        if reply.has_error():
            return "unavailable"
        try:
            if outcome(reply.content) == "failed":
                return self._failure(reply)
            trained = TrainReply.parse(reply.content)
            answers.sum.add(trained.update, trained.examples)
        except ProtocolError as error:
            log.warning("a training reply was thrown away: %s", error)
            return "malformed reply"
        if self._needs is Needs.SINGLE_UPDATES:
            answers.single.append(_as_flower(self._weights + trained.update, trained.examples))
        answers.received_bytes += trained.update.nbytes
        if trained.tally:
            answers.tallies.append(trained.tally)
        return "trained"

    def _failure(self, reply: Message) -> str:
        failure = Failure.parse(reply.content)
        if failure.reason == UNKNOWN_STUDY:
            self._admission.forget(reply.metadata.src_node_id)
        return f"{failure.code.value}: {failure.reason}" if failure.reason else failure.code.value

    def _aggregate(self, number: int, answers: _Answers) -> Flat:
        """Let the strategy make the new model of the mean update (one virtual reply), or of the single ones."""
        replies = answers.single or [_as_flower(self._weights + answers.sum.mean(), answers.sum.weight)]
        arrays, _ = self._strategy.aggregate_train(number, replies)
        if arrays is None:
            raise ProtocolError(f"strategy {self._study.strategy.name} made no model of round {number}")
        weights = unpack(RecordDict({"arrays": arrays}), "arrays").astype(np.float32, copy=False)
        self._layout.check(weights)
        return weights

    def _evaluate(self, number: int, cohort: dict[int, str]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Held-out scores over all sites, and by site, of the tallies that sites release."""
        if number % self._study.rounds.evaluate_every and number != self._study.rounds.count:
            return {}, {}
        config = request_config(self._study.digest, number)
        view = CohortGrid(self._grid, cohort)
        messages = list(self._strategy.configure_evaluate(number, pack(self._weights), config, view))
        tallies: dict[str, Mapping[str, float]] = {}
        done: list[str] = []
        self._reporter.stage(number, Kind.EVALUATE.value, done, list(cohort.values()))
        for reply in exchange(self._grid, messages, deadline_s=self._study.rounds.deadline_s, stop=self._stop):
            name = cohort.get(reply.metadata.src_node_id)
            if name is None:
                continue
            done.append(name)
            self._reporter.stage(number, Kind.EVALUATE.value, done, list(cohort.values()))
            try:
                if reply.has_content() and (tally := EvaluateReply.parse(reply.content).tally):
                    tallies[name] = tally
            except ProtocolError as error:
                log.warning("an evaluation reply was thrown away: %s", error)
        return read(add(tallies.values())), {name: read(tally) for name, tally in tallies.items()}


def _as_flower(weights: Flat, examples: int) -> Message:
    """A reply in the form Flower's strategies aggregate: full weights and how many examples they stand for."""
    content = RecordDict({"arrays": pack(weights), "metrics": MetricRecord({"num-examples": examples})})
    return Message(content, dst_node_id=0, message_type=Kind.TRAIN.value)
