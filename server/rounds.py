"""The round loop: who takes part, train, sum, let the strategy decide, evaluate, checkpoint; again until done."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from threading import Event
from typing import TypeVar

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from medfl.server.admission import Admission, Directory
from medfl.server.answers import Answers
from medfl.server.buffered import BufferedCollector
from medfl.server.checkpoint import Checkpoint, CheckpointFolder, Metrics
from medfl.server.clear import ClearCollector
from medfl.server.cohort import CohortGrid
from medfl.server.collector import TRAINED, Collected, Collector, Evaluated
from medfl.server.convergence import Convergence
from medfl.server.ending import Ending, Result
from medfl.server.gathering import Gathering
from medfl.server.handed_out import HandedOut
from medfl.server.heads import HeadKeeping, Heads
from medfl.server.pace import Pace
from medfl.server.reporter import Reporter, RoundReport
from medfl.server.safeguards import Good, Watch
from medfl.server.secure import VOID, SecureCollector
from medfl.server.stage import LOST, MALFORMED, Stages
from medfl.server.weight_sum import SecureParts
from medfl.shared.algorithms.beginning import Beginning, begin
from medfl.shared.algorithms.settings import FedBuffSettings
from medfl.shared.arrays import as_numpy
from medfl.shared.errors import Code, ConfigError, ProtocolError
from medfl.shared.messages import TENSOR, pack, request_config, tell_counted
from medfl.shared.metrics import headline, read
from medfl.shared.privacy.settings import NoPrivacy
from medfl.shared.study import Study
from medfl.shared.weights import Flat, Layout
from medfl.strategies.build import build_strategy, needs_of
from medfl.strategies.rule import RuleStrategy
from medfl.strategies.state import capture, restore

log = logging.getLogger("medfl.server")
T = TypeVar("T")

_VOID_ROUNDS = 5  # as many void rounds in a row, for what sites say and not for sites cut off, end the study
_VOID_S = 1.0  # after a void round: who was cut off is about to be back,
_LONGEST_VOIDS = 60  # times as long at most: after the third void round in a row each pause is twice the one before
_SCORINGS = 3  # a study whose final model nobody has scored tells little: sites may be back the next time
_DISK_S = 5.0  # between attempts to write to a full disk


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
        secure: SecureParts | None = None,
        beginning: Beginning | None = None,
        keeping: HeadKeeping | None = None,
        signature: bytes = b"",
        initial: bytes | None = None,
    ) -> None:
        """Prepare the study; ``secure`` is needed where the study asks for secure aggregation.

        ``beginning`` is the study's first model (absent: made here), ``initial`` the file of the weights it names.
        ``keeping`` remembers over restarts how long the sites' records were; virtual sites have none. Without the
        consortium's ``signature`` no site takes part.
        """
        self._study = study
        self._grid = grid
        self._checkpoints = checkpoints
        self._reporter = reporter
        self._stop = stop
        self._series = series
        self._admission = Admission(study, grid, directory, signature, initial)
        self._directory = directory
        self._strategy = build_strategy(study)
        beginning = beginning or begin(study, initial)
        self._layout, self._weights = beginning.layout, beginning.weights
        self._round = 0
        self._answers = Answers()
        self._gathering = Gathering(study, self._admission, directory, reporter, stop)
        self._watch = Watch(study.safeguards)
        self._handed_out = HandedOut(study, checkpoints)
        stages = Stages(grid, reporter, stop, Pace(study.rounds.deadline_s), self._admission)
        self._convergence = Convergence(study.rounds.converged)
        self._metrics = Metrics()  # of the last complete round
        self._scorings = _SCORINGS
        self._rosters = None if secure is None else secure.rosters
        self._collector = _collector(study, stages, self._layout, secure)
        self._heads: Heads | None = None
        if keeping is not None or not isinstance(study.privacy, NoPrivacy):
            self._heads = Heads(study.digest, stages, keeping)

    def run(self) -> Result:
        """Run to the study's end, going on from the latest checkpoint where there is one."""
        evaluated = self._resume()
        self._reporter.started(self._study, self._round + 1 if evaluated else self._round)
        ending = self._run(evaluated)
        self._reporter.ended(ending.value)
        of_round, weights = self._finished(ending)
        return Result(ending, self._round, weights, self._layout, of_round)

    def _finished(self, ending: Ending) -> tuple[int, Flat]:
        """The model that is handed out and its round: where the study watches its score, the one with the best."""
        converged, best = self._study.rounds.converged, self._convergence.best
        if ending in (Ending.DONE, Ending.CONVERGED) and converged and converged.keep == "best" and best:
            if (kept := self._handed_out.best(best.round)) is not None:
                return best.round, kept
            log.warning("the model of round %d, the best, cannot be read: that of the last round stands", best.round)
        return self._round, self._model

    def _run(self, evaluated: bool) -> Ending:
        rounds, void, in_a_row, since = self._study.rounds, 0, 0, time.monotonic()
        while not self._convergence.reached and (self._round < rounds.count or not evaluated):
            cohort = self._gathering.gather(self._round, quorum=self._quorum, until=since + rounds.patience_s)
            if self._stop.is_set():
                return Ending.STOPPED
            if not self._admission.may_still_be(self._quorum):
                return Ending.BUDGET_SPENT
            if not cohort and self._round < rounds.count:
                return Ending.NO_QUORUM
            if not evaluated:  # the last thing before a restart, or a full disk, was this round's checkpoint
                evaluated = self._attempt(partial(self._report, time.monotonic(), cohort)) is not None
                continue
            began = time.monotonic()
            collected = self._attempt(partial(self._one_round, cohort))
            if collected is None:
                since = time.monotonic()
            elif collected.replies:
                void, in_a_row, since = 0, 0, time.monotonic()
                evaluated = self._attempt(partial(self._report, began, cohort)) is not None
            elif self._admission.may_still_be(self._quorum) and not self._stop.is_set():
                void += self._fault_of_sites(collected)
                if void == _VOID_ROUNDS:
                    return Ending.VOID_ROUNDS
                if time.monotonic() > since + rounds.patience_s:
                    return Ending.NO_QUORUM
                in_a_row += 1
                self._stop.wait(_pause_s(in_a_row))
        return Ending.CONVERGED if self._convergence.reached else Ending.DONE

    def _fault_of_sites(self, collected: Collected) -> bool:
        """Whether a round is void for what sites have said, and would be although those that were cut off came back."""
        faults = sum(_is_fault(word) for word in collected.outcomes.values())
        return faults > 0 and len(collected.outcomes) - faults < self._quorum

    @property
    def _quorum(self) -> int:
        """Sites that a round needs: secure sums are opened over no fewer than the roster says, whatever the study."""
        least = 0 if self._rosters is None else self._rosters.choose(()).roster.minimum_cohort
        return max(self._study.rounds.minimum_sites, least)

    @property
    def _epoch(self) -> int | None:
        """The roster's, where the study sums securely."""
        return None if self._rosters is None else self._rosters.choose(()).roster.epoch

    def _resume(self) -> bool:
        """Take up the latest checkpoint; whether its round has been evaluated (True where there is none)."""
        if self._checkpoints is None or (checkpoint := self._checkpoints.load(self._study)) is None:
            return True
        self._layout.check(checkpoint.weights)
        self._weights, self._round, self._metrics = checkpoint.weights, checkpoint.round, checkpoint.metrics
        self._handed_out.average = checkpoint.average
        trained = {site for site, word in checkpoint.metrics.outcomes.items() if word == TRAINED}
        self._gathering.expect(trained & set(self._directory.enrolled()))
        restore(self._strategy, checkpoint.strategy)
        self._answers = Answers.of(checkpoint.answers)
        self._watch.restore(checkpoint.watch, checkpoint.good)
        log.info("going on after round %d of study %s", self._round, self._study.name)
        if checkpoint.epoch != self._epoch:
            log.info("the roster has changed since: epoch %s was, %s is", checkpoint.epoch, self._epoch)
        evaluated, best = self._checkpoints.evaluated()
        known = evaluated == self._round
        self._convergence = Convergence(self._study.rounds.converged, best if known else checkpoint.metrics.best)
        if known:
            self._convergence.look(self._round)
        return evaluated >= self._round

    def _attempt(self, step: Callable[[], T]) -> T | None:
        """What ``step`` returns; None where the disk refused something in it, after a pause: it is to be done again."""
        try:
            return step()
        except OSError as error:
            log.error("the disk refuses (%s): free space; round %d goes on then", error, self._round + 1)
            self._stop.wait(_DISK_S)
            return None

    def _one_round(self, cohort: Mapping[int, str]) -> Collected:
        """Train, aggregate, make durable. Where too few sites answered there are no replies and nothing has changed."""
        number = self._round + 1
        elsewhere: dict[str, str] = {}
        if self._heads is not None:
            cohort, elsewhere = self._heads.agree(number, cohort, quorum=self._study.rounds.minimum_sites)
        enough = len(cohort) >= self._quorum and not self._stop.is_set()  # Flower's strategies wait for more for ever
        collected = self._train(number, cohort) if enough else Collected()
        collected.outcomes = elsewhere | collected.outcomes
        if collected.trained < self._quorum or not collected.replies:
            collected.replies = []
            failed = ", ".join(f"{name}: {why}" for name, why in collected.outcomes.items() if why != TRAINED)
            if self._stop.is_set():
                log.info("round %d is given up: the study is being stopped", number)
            else:
                trained = collected.trained
                log.warning("round %d is void: %d of %d sites trained (%s)", number, trained, len(cohort), failed)
            return collected
        self._weights = self._aggregate(number, collected)
        self._round = number
        self._answers.note(number, collected)
        self._handed_out.follow(number, self._weights)
        self._metrics = Metrics(
            collected.outcomes, dict(collected.tally), collected.received_bytes, self._convergence.best
        )
        self._keep()
        return collected

    def _keep(self) -> None:
        """Make the round's state durable. A full disk is waited for: the round was paid for. Not when stopped."""
        if self._checkpoints is None:
            self._collector.settled()
            return
        checkpoint = Checkpoint(
            study=self._study.digest,
            round=self._round,
            weights=self._weights,
            strategy=capture(self._strategy),
            series=self._series,
            average=self._handed_out.average,
            answers=self._answers.state(),
            epoch=self._epoch,
            metrics=self._metrics,
            watch=self._watch.state(),
            good=self._watch.arrays(),
        )
        while True:
            try:
                self._checkpoints.save(checkpoint)
                self._collector.settled()
                return
            except OSError as error:
                log.error("the checkpoint of round %d cannot be written (%s): free space", self._round, error)
                if self._stop.wait(_DISK_S):
                    return

    def _judge(self, scores: Mapping[str, float]) -> str:
        """Take the model back where its score fell; in words what was done, empty for nothing."""
        found = headline(scores)
        if self._study.safeguards.max_fall is None or found is None:
            return ""
        name, score = found
        if not self._watch.fell(score):
            self._watch.good = Good(self._weights, capture(self._strategy), copy.deepcopy(self._answers))
            return ""
        good = self._watch.good
        assert good is not None  # noqa: S101 - nothing falls before something stood
        self._weights, self._answers = good.weights, copy.deepcopy(good.answers)
        restore(self._strategy, good.strategy)
        self._keep()
        return f"taken back: {name} {score:.3f} after {self._watch.best:.3f}"

    def _train(self, number: int, cohort: Mapping[int, str]) -> Collected:
        view = CohortGrid(self._grid, cohort)

        def configure(config: ConfigRecord) -> list[Message]:
            messages = list(self._strategy.configure_train(number, pack(self._weights), config, view))
            if self._study.demands.settles:
                for message in messages:
                    tell_counted(message, self._answers.counted.get(cohort[message.metadata.dst_node_id], 0))
            return messages

        if (collected := self._collector.unfinished(self._weights, cohort)) is not None:
            configure(request_config(self._study.digest, number))  # strategies note what they sent
            return collected
        return self._collector.train(number, self._weights, cohort, configure, quorum=self._quorum)

    def _aggregate(self, number: int, collected: Collected) -> Flat:
        """Let the strategy make the new model of the mean update (one virtual reply), or of the single ones."""
        if isinstance(self._strategy, RuleStrategy):
            self._strategy.share = self._answers.share(collected, self._admission.taking_part().values())
        arrays, _ = self._strategy.aggregate_train(number, collected.replies)
        if arrays is None:
            raise ProtocolError(f"strategy {self._study.strategy.name} made no model of round {number}")
        weights = as_numpy(arrays[TENSOR]).astype(np.float32, copy=False)  # FedAdam computes in float64
        if collected.relative:
            weights = self._weights + weights
        self._layout.check(weights)
        return self._watch.step(self._weights, weights)

    @property
    def _model(self) -> Flat:
        return self._handed_out.model(self._round, self._weights)

    def _report(self, started: float, cohort: Mapping[int, str]) -> RoundReport | None:
        """Let the cohort score the newest round, and tell; None where the last round's scores are to be tried again."""
        number, rounds = self._round, self._study.rounds
        view = CohortGrid(self._grid, cohort)

        def configure(config: ConfigRecord) -> list[Message]:
            return list(self._strategy.configure_evaluate(number, pack(self._model), config, view))

        evaluated = Evaluated()
        if cohort and (number % rounds.evaluate_every == 0 or number == rounds.count):
            evaluated = self._collector.evaluate(number, self._model, cohort, configure)
        if evaluated.missed and number == rounds.count and self._scorings > 1 and not self._stop.is_set():
            self._scorings -= 1
            log.info("the last round has no scores yet: they are asked for once more")
            return None
        scores = read(evaluated.tally)
        if self._convergence.better(number, scores) is not None:
            self._handed_out.keep_best(number, self._model)
        report = RoundReport(
            round=number,
            seconds=time.monotonic() - started,
            outcomes=self._metrics.outcomes,
            training=read(self._metrics.training),
            scores=scores,
            site_scores={name: read(tally) for name, tally in evaluated.by_site.items()},
            received_bytes=self._metrics.received_bytes,
            note=self._judge(scores),
        )
        self._convergence.note(number, report.scores)
        self._reporter.finished_round(report)
        if self._checkpoints is not None:
            try:
                self._checkpoints.mark_evaluated(number, self._convergence.best)
            except OSError as error:  # a restart would score this round again, and lose nothing
                log.warning("that round %d is scored cannot be written (%s): free space", number, error)
        return report


def _pause_s(void_in_a_row: int) -> float:
    """After so many void rounds, how long to the next one."""
    return float(_VOID_S * min(_LONGEST_VOIDS, 2 ** max(0, void_in_a_row - 3)))


def _is_fault(word: str) -> bool:
    """Whether an outcome is a site's own word that it failed or refuses, and not that it, or others, were away."""
    word = word.removeprefix(VOID)
    return word == MALFORMED or (word.partition(":")[0] in set(Code) and not word.endswith(LOST))


def _collector(study: Study, stages: Stages, layout: Layout, secure: SecureParts | None) -> Collector:
    needs = needs_of(study)
    if isinstance(study.strategy, FedBuffSettings):
        return BufferedCollector(study, stages, staleness=study.strategy.staleness)
    if study.secure_aggregation.mode == "none":
        return ClearCollector(study, stages, needs)
    if secure is None:
        raise ConfigError(f"study {study.name} asks for secure aggregation, and no roster is configured: name one")
    return SecureCollector(study, stages, layout, secure)
