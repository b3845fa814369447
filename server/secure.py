"""Results under secure aggregation: sites hold them, and the coordinator learns one masked sum over all."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Message

from medfl.server.collector import TRAINED, Collected, Configure, Evaluated, as_flower
from medfl.server.secagg.finish import finish
from medfl.server.secagg.outcome import SecureSum, SumPlan, SumVoid
from medfl.server.secagg.round import SecureRound
from medfl.server.secagg.store import Store
from medfl.server.stage import Stages
from medfl.shared.algorithms.needs import Beside, demands_of
from medfl.shared.errors import ConfigError, ProtocolError
from medfl.shared.files import write_whole
from medfl.shared.messages import (
    EvaluateReply,
    Failure,
    Kind,
    Ready,
    SecureReply,
    SecureRequest,
    WeightRequest,
    outcome,
    request_config,
)
from medfl.shared.metrics import EXAMPLES, LOSS, tally_names
from medfl.shared.privacy.settings import NoPrivacy
from medfl.shared.secagg.announcement import Purpose
from medfl.shared.secagg.clipping import clip_by_class, merge, widened
from medfl.shared.secagg.encoding import Encoding, Segment
from medfl.shared.secagg.exchange import Phase, PhaseReply, PhaseRequest, SiteRefusal
from medfl.shared.secagg.rings import Ring
from medfl.shared.secagg.roster import Roster
from medfl.shared.study import Study
from medfl.shared.weights import Flat, Layout, weights_digest

log = logging.getLogger("medfl.server")

NO_MODEL = bytes(32)
_UPLOADS = 4  # masked vectors on their way at a time


@dataclass(frozen=True)
class SecureParts:
    """What secure aggregation needs beside the study."""

    roster: Roster
    store: Store
    memory: Path | None  # file for the sum of all weights; None keeps it in this process


class SecureCollector:
    """Runs MSA-1 after each stage; a stage's own replies say only that a result is ready."""

    def __init__(self, study: Study, stages: Stages, layout: Layout, parts: SecureParts) -> None:
        self._study = study
        self._stages = stages
        self._parts = parts
        self._ids = {member.name: member.id for member in parts.roster.members}
        settings = study.secure_aggregation
        self._ring = Ring(settings.ring_bits)
        self._demands = demands_of(study.strategy)
        self._segments = _segments(layout, study)
        self._private = not isinstance(study.privacy, NoPrivacy)
        self._reference: tuple[int, frozenset[str]] = (0, frozenset())  # sum of all weights, and whose

    def train(
        self, number: int, weights: Flat, cohort: Mapping[int, str], configure: Configure, *, quorum: int
    ) -> Collected:
        """Let the cohort train, then sum what those that are ready hold."""
        collected = Collected()
        try:
            encoding = self._train_encoding(number, cohort)
        except SumVoid as void:
            log.warning("the sum of the sites' weights did not come about: %s", void)
            collected.outcomes = self._words(void, cohort)
            return collected
        messages = configure(request_config(self._study.digest, number, encoding=encoding.to_bytes()))
        self._stages.run(number, "training", messages, cohort, collected.outcomes, take=_ready)
        ready = {node: site for node, site in cohort.items() if collected.outcomes.get(site) == TRAINED}
        if len(ready) < max(quorum, self._parts.roster.minimum_cohort):
            collected.outcomes |= dict.fromkeys(ready.values(), "held back: too few sites")
            return collected
        plan = self._plan(Purpose.TRAIN, encoding, weights, ready)
        try:
            self._stages.reporter.stage(number, "secure sum", [], list(ready.values()))
            total = SecureRound(plan, roster=self._parts.roster, store=self._parts.store).run(self._exchange(ready))
        except SumVoid as void:
            log.warning("round %d: %s", number, void)
            collected.outcomes |= self._words(void, ready)
            return collected
        self._take(total, collected, weights, ready)
        return collected

    def evaluate(self, number: int, weights: Flat, cohort: Mapping[int, str], configure: Configure) -> Evaluated:
        """Let the cohort score the weights; only sums over all are learnt, and nothing where privacy is promised."""
        by_site: dict[str, Mapping[str, float]] = {}

        def take(site: str, reply: Message) -> str:
            if outcome(reply.content) == "ready":
                Ready.parse(reply.content)
            elif tally := EvaluateReply.parse(reply.content).tally:
                by_site[site] = tally
            return TRAINED

        names = () if self._private else tally_names(self._study.scoring, self._study.data.classes)
        encoding = Encoding(Ring.BITS_32, (), 0, names)
        config = request_config(self._study.digest, number, encoding=b"" if self._private else encoding.to_bytes())
        outcomes: dict[str, str] = {}
        self._stages.run(number, Kind.EVALUATE.value, configure(config), cohort, outcomes, take=take)
        ready = {node: site for node, site in cohort.items() if outcomes.get(site) == TRAINED}
        if self._private or len(ready) < self._parts.roster.minimum_cohort:
            return Evaluated({}, by_site)
        try:
            plan = self._plan(Purpose.EVALUATE, encoding, weights, ready)
            total = SecureRound(plan, roster=self._parts.roster, store=self._parts.store).run(self._exchange(ready))
        except SumVoid as void:
            log.warning("scores of round %d were not summed: %s", number, void)
            return Evaluated({}, by_site)
        return Evaluated(dict(total.scalars), by_site)

    def unfinished(self, weights: Flat, cohort: Mapping[int, str]) -> Collected | None:
        """Finish the sum that was about to be unmasked when the coordinator was killed."""
        pending = self._parts.store.pending(bytes.fromhex(self._study.digest))
        if pending is None or pending.announcement.purpose is not Purpose.TRAIN:
            return None
        if pending.announcement.model.hex() != weights_digest(weights):
            return None
        log.info("finishing the masked sum of %d sites that was begun before the restart", len(pending.survivors))
        collected = Collected()
        try:
            total = finish(pending, roster=self._parts.roster, exchange=self._exchange(cohort))
        except SumVoid as void:
            log.warning("the masked sum from before the restart could not be finished: %s", void)
            return None
        self._take(total, collected, weights, cohort)
        return collected

    def settled(self) -> None:
        """The sum is in a checkpoint: what was kept to finish it can go."""
        self._parts.store.forget(bytes.fromhex(self._study.digest))

    def _take(self, total: SecureSum, collected: Collected, weights: Flat, cohort: Mapping[int, str]) -> None:
        survivors = {self._parts.roster.name(site) for site in total.survivors}
        for site in cohort.values():
            if site not in survivors and collected.outcomes.get(site, TRAINED) == TRAINED:
                why = total.refusals.get(self._ids.get(site, 0))
                collected.outcomes[site] = f"left the secure sum: {why}" if why else "left the secure sum"
        collected.outcomes |= dict.fromkeys(survivors, TRAINED)
        if self._demands.takes_updates:
            collected.replies, collected.relative = [as_flower(total.mean, total.weight)], True
        else:
            collected.replies = [as_flower(weights + total.mean, total.weight)]
        collected.tally = dict(total.scalars)
        collected.received_bytes = len(survivors) * total.mean.size * int(self._ring) // 8
        values = len(total.survivors) * total.mean.size
        wider = widened(self._segments, clipped=total.clipped, contributed=values)
        if wider != self._segments:
            log.warning("%.2g %% of the values were clipped: the clip is doubled", 100 * total.clipped / values)
            self._segments = wider

    def _train_encoding(self, number: int, cohort: Mapping[int, str]) -> Encoding:
        """With the sum of all weights as its reference, summed anew when a site is in the cohort that is not in it."""
        rounding = self._ring is Ring.BITS_16
        if self._private:  # every site weighs 1: an exact number of patients would be a release of its own
            return Encoding(self._ring, self._segments, len(self._parts.roster.members), (), stochastic=rounding)
        reference, sites = self._known_reference()
        if reference == 0 or not set(cohort.values()) <= sites:
            encoding = Encoding(Ring.BITS_32, (), 0, ())
            request = WeightRequest(self._study.digest, encoding.to_bytes()).record()
            deadline = self._study.secure_aggregation.phase_deadline_s
            messages = [
                Message(request, dst_node_id=node, message_type=Kind.WEIGHT.value, ttl=deadline) for node in cohort
            ]
            outcomes: dict[str, str] = {}
            self._stages.run(number, "weights", messages, cohort, outcomes, take=_ready)
            ready = {node: site for node, site in cohort.items() if outcomes.get(site) == TRAINED}
            plan = SumPlan(bytes.fromhex(self._study.digest), Purpose.SETUP, self._site_ids(ready), encoding, NO_MODEL)
            try:
                total = SecureRound(plan, roster=self._parts.roster, store=self._parts.store).run(self._exchange(ready))
            except ConfigError as error:
                raise SumVoid(str(error), confirmed=False) from None
            reference = round(total.weight)
            self._keep_reference(reference, {self._parts.roster.name(site) for site in total.survivors})
        return Encoding(self._ring, self._segments, reference, (LOSS, EXAMPLES), stochastic=rounding)

    def _known_reference(self) -> tuple[int, frozenset[str]]:
        if self._reference[0] == 0 and self._parts.memory is not None:
            try:
                content = json.loads(self._parts.memory.read_bytes())
                if content["roster"] == self._parts.roster.digest.hex():
                    self._reference = int(content["weight"]), frozenset(content["sites"])
            except (OSError, ValueError, KeyError, TypeError):
                pass  # summed again
        return self._reference

    def _keep_reference(self, weight: int, sites: set[str]) -> None:
        self._reference = weight, frozenset(sites)
        if self._parts.memory is not None:
            content = {"weight": weight, "sites": sorted(sites), "roster": self._parts.roster.digest.hex()}
            write_whole(self._parts.memory, json.dumps(content).encode())

    def _plan(self, purpose: Purpose, encoding: Encoding, weights: Flat, cohort: Mapping[int, str]) -> SumPlan:
        model = bytes.fromhex(weights_digest(weights))
        return SumPlan(bytes.fromhex(self._study.digest), purpose, self._site_ids(cohort), encoding, model)

    def _site_ids(self, cohort: Mapping[int, str]) -> tuple[int, ...]:
        return tuple(sorted(self._ids[site] for site in cohort.values() if site in self._ids))

    def _words(self, void: SumVoid, cohort: Mapping[int, str]) -> dict[str, str]:
        return {
            site: f"secure sum void: {void.refusals.get(self._ids.get(site, 0), 'others are missing')}"
            for site in cohort.values()
        }

    def _exchange(self, cohort: Mapping[int, str]) -> GridExchange:
        nodes = {self._ids[site]: node for node, site in cohort.items() if site in self._ids}
        return GridExchange(self._stages, nodes, deadline_s=self._study.secure_aggregation.phase_deadline_s)


def _segments(layout: Layout, study: Study) -> tuple[Segment, ...]:
    """Clips of the model, and after it of what the study's strategy sends beside it."""
    settings, beside = study.secure_aggregation, demands_of(study.strategy).beside
    model = clip_by_class(layout, weights=settings.clip, statistics=settings.statistics_clip)
    match beside:
        case Beside.NOTHING:
            return model
        case Beside.ONE_VALUE:
            return merge([*model, Segment(1, settings.statistics_clip)])
        case Beside.A_MODEL:
            return merge([*model, *model])


class GridExchange:
    """Carries the phases of a secure sum over a Flower grid: a request is asked of a node, its reply authenticated by
    the node's key. Masked vectors are let in a few at a time, so that few lie in the object store at once.
    """

    def __init__(self, stages: Stages, nodes: Mapping[int, int], *, deadline_s: float) -> None:
        self._stages = stages
        self._nodes = nodes  # site id -> node id
        self._deadline_s = deadline_s

    def __call__(
        self, phase: Phase, requests: Mapping[int, PhaseRequest], /
    ) -> Iterator[tuple[int, PhaseReply | SiteRefusal]]:
        """Send ``requests`` (by site id) and yield the answers until the deadline; see the protocol's Exchange."""
        waiting = [site for site in requests if site in self._nodes]
        at_once = _UPLOADS if phase is Phase.MASKED_INPUT else len(waiting)
        asked: dict[str, tuple[int, float]] = {}  # message id -> site, when it is given up
        grid, stop = self._stages.grid, self._stages.stop
        while (waiting or asked) and not stop.is_set():
            while waiting and len(asked) < at_once:
                site = waiting.pop(0)
                message = Message(
                    SecureRequest(phase, requests[site].control).record(),
                    dst_node_id=self._nodes[site],
                    message_type=Kind.PHASE.value,
                    ttl=self._deadline_s,
                )
                (identity,) = grid.push_messages([message])
                asked[identity] = (site, time.monotonic() + self._deadline_s)
            replies = list(grid.pull_messages(set(asked)))
            for reply in replies:
                known = asked.pop(reply.metadata.reply_to_message_id, None)
                if known is not None and reply.metadata.src_node_id == self._nodes[known[0]]:
                    yield known[0], _read(reply)
            now = time.monotonic()
            asked = {identity: (site, ends) for identity, (site, ends) in asked.items() if now < ends}
            if asked and not replies:
                stop.wait(0.02)


def _read(reply: Message) -> PhaseReply | SiteRefusal:
    if reply.has_error():
        return SiteRefusal.of(ProtocolError("", reason="unavailable"))
    try:
        if outcome(reply.content) == "failed":
            failure = Failure.parse(reply.content)
            return SiteRefusal(failure.code, failure.reason)
        return SecureReply.parse(reply.content).reply
    except ProtocolError:
        return SiteRefusal.of(ProtocolError("", reason="malformed reply"))


def _ready(site: str, reply: Message) -> str:
    Ready.parse(reply.content)
    return TRAINED
