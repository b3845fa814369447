"""Results under secure aggregation: sites hold them, and the coordinator learns one masked sum over all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from flwr.app import Message

from medfl.server.adaptive_clip import Clip
from medfl.server.clips import Clips
from medfl.server.collector import TRAINED, Collected, Configure, Evaluated
from medfl.server.safeguards import shortened
from medfl.server.secagg.finish import finish
from medfl.server.secagg.outcome import SecureSum, SumPlan, SumVoid
from medfl.server.secagg.round import summed
from medfl.server.secure_exchange import GridExchange
from medfl.server.stage import Stages
from medfl.server.weight_sum import SecureParts, WeightSum, is_ready
from medfl.shared.arrays import as_numpy
from medfl.shared.messages import (
    TENSOR,
    EvaluateReply,
    Kind,
    Ready,
    outcome,
    request_config,
)
from medfl.shared.metrics import EXAMPLES, LOSS, tally_names
from medfl.shared.privacy.settings import ClientLevel, NoPrivacy
from medfl.shared.secagg.announcement import Purpose
from medfl.shared.secagg.encoding import Encoding
from medfl.shared.secagg.rings import Ring
from medfl.shared.secagg.roster import Roster
from medfl.shared.study import Study
from medfl.shared.weights import Flat, Layout, weights_digest
from medfl.strategies.secure_aggregation import virtual_reply

log = logging.getLogger("medfl.server")

UNCONFIRMED = "waits: a roster is not confirmed there, or elsewhere"
VOID = "secure sum void: "
"""How the outcome of a site begins when no sum came about; then why, where the site itself has said so."""


class SecureCollector:
    """Runs MSA-1 after each stage; a stage's own replies say only that a result is ready."""

    def __init__(self, study: Study, stages: Stages, layout: Layout, parts: SecureParts) -> None:
        self._study = study
        self._stages = stages
        self._layout = layout
        self._parts = parts
        self._use(parts.rosters.choose(()).roster)
        settings = study.secure_aggregation
        self._ring = Ring(settings.ring_bits)
        self._demands = study.demands
        self._clips = Clips(study, layout, None if parts.memory is None else parts.memory.with_name("clips.json"))
        self._private = not isinstance(study.privacy, NoPrivacy)
        self._weights = WeightSum(study, stages, parts)
        self._clip = _clip(study, parts)

    def train(
        self, number: int, weights: Flat, cohort: Mapping[int, str], configure: Configure, *, quorum: int
    ) -> Collected:
        """Let the cohort train, then sum what those that are ready hold."""
        collected = Collected()
        cohort, collected.outcomes = self._under_one_roster(cohort)
        try:
            reference, counted = self._sum_of_weights(number, cohort)
        except SumVoid as void:
            self._stages.void("the sum of the sites' weights did not come about: %s", void)
            collected.outcomes |= self._words(void, cohort)
            return collected
        encoding = self._train_encoding(reference)
        config = request_config(self._study.digest, number, encoding=encoding.to_bytes())
        messages = [message for message in configure(config) if message.metadata.dst_node_id in counted]
        sent = self._sent(messages, weights)
        self._stages.run(number, "training", messages, cohort, collected.outcomes, take=is_ready, quorum=quorum)
        ready = {node: site for node, site in cohort.items() if collected.outcomes.get(site) == TRAINED}
        if len(ready) < max(quorum, self._roster.minimum_cohort):
            collected.outcomes |= dict.fromkeys(ready.values(), "held back: too few sites")
            return collected
        self._stages.reporter.stage(number, "secure sum", [], list(ready.values()))
        try:
            total = self._summed(self._plan(Purpose.TRAIN, encoding, weights, ready, number, sent), ready)
        except SumVoid as void:
            self._stages.void("round %d: %s", number, void)
            collected.outcomes |= self._words(void, ready)
            return collected
        self._take(total, encoding, collected, weights, ready)
        return collected

    def evaluate(self, number: int, weights: Flat, cohort: Mapping[int, str], configure: Configure) -> Evaluated:
        """Let the cohort score the weights; only sums over all are learnt, and nothing where privacy is promised."""
        by_site: dict[str, Mapping[str, float]] = {}
        cohort, _ = self._under_one_roster(cohort)

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
        messages = [message for message in configure(config) if message.metadata.dst_node_id in cohort]
        self._stages.run(number, Kind.EVALUATE.value, messages, cohort, outcomes, take=take)
        ready = {node: site for node, site in cohort.items() if outcomes.get(site) == TRAINED}
        if self._private:
            return Evaluated({}, by_site)
        if len(ready) < self._roster.minimum_cohort:
            return Evaluated({}, by_site, missed=True)
        try:
            plan = self._plan(Purpose.EVALUATE, encoding, weights, ready, number)
            total = self._summed(plan, ready)
        except SumVoid as void:
            self._stages.void("scores of round %d were not summed: %s", number, void)
            return Evaluated({}, by_site, missed=True)
        return Evaluated(dict(total.scalars), by_site)

    def _summed(self, plan: SumPlan, ready: Mapping[int, str]) -> SecureSum:
        return summed(plan, roster=self._roster, store=self._parts.store, exchange=self._exchange(ready))

    def unfinished(self, weights: Flat, cohort: Mapping[int, str]) -> Collected | None:
        """Finish the sum that was about to be unmasked when the coordinator was killed."""
        pending = self._parts.store.pending(bytes.fromhex(self._study.digest))
        if pending is None or pending.announcement.purpose is not Purpose.TRAIN:
            return None
        if pending.announcement.model.hex() != weights_digest(weights):
            return None
        roster = self._parts.rosters.with_digest(pending.announcement.roster)
        if roster is None:
            log.warning("the masked sum from before the restart was begun under a roster that is not here any more")
            return None
        self._use(roster)
        log.info("finishing the masked sum of %d sites that was begun before the restart", len(pending.survivors))
        collected = Collected()
        try:
            total = finish(pending, roster=self._roster, exchange=self._exchange(cohort))
        except SumVoid as void:
            self._stages.void("the masked sum from before the restart could not be finished: %s", void)
            return None
        self._take(total, pending.encoding, collected, weights, cohort)
        return collected

    def settled(self) -> None:
        """The sum is in a checkpoint: what was kept to finish it can go."""
        self._parts.store.forget(bytes.fromhex(self._study.digest))

    def _take(
        self, total: SecureSum, encoding: Encoding, collected: Collected, weights: Flat, cohort: Mapping[int, str]
    ) -> None:
        survivors = {self._roster.name(site) for site in total.survivors}
        for site in cohort.values():
            if site not in survivors and collected.outcomes.get(site, TRAINED) == TRAINED:
                why = total.refusals.get(self._ids.get(site, 0))
                collected.outcomes[site] = f"left the secure sum: {why}" if why else "left the secure sum"
        collected.outcomes |= dict.fromkeys(survivors, TRAINED)
        mean = shortened(total.mean, self._study.safeguards, length=weights.size, whose="all sites together")
        collected.replies = [virtual_reply(weights, mean, total.weight, self._demands)]
        collected.relative = self._demands.takes_updates
        collected.tally, collected.weight = dict(total.scalars), total.weight
        collected.weight_of_all = encoding.reference
        if self._clip is not None:
            self._clip.follow(total.scalars, sites=len(survivors))
            collected.tally = {}
        collected.received_bytes = len(survivors) * total.mean.size * int(self._ring) // 8
        self._clips.follow(total, encoding.segments)

    def _train_encoding(self, reference: int) -> Encoding:
        rounding = self._ring is Ring.BITS_16
        if self._private:  # nothing exact goes with a private update
            names = () if self._clip is None else self._clip.names
            return Encoding(self._ring, self._clips.of(names), reference, names, stochastic=rounding)
        return Encoding(self._ring, self._clips.segments, reference, (LOSS, EXAMPLES), stochastic=rounding)

    def _sum_of_weights(self, number: int, cohort: Mapping[int, str]) -> tuple[int, Mapping[int, str]]:
        """The reference of the encoding, and the sites that it counts."""
        if self._private:  # every site weighs 1: an exact number of patients would be a release of its own
            return len(self._roster.members), cohort
        return self._weights.of(number, cohort, self._roster)

    def _use(self, roster: Roster) -> None:
        self._roster = roster
        self._ids = {member.name: member.id for member in roster.members}

    def _under_one_roster(self, cohort: Mapping[int, str]) -> tuple[Mapping[int, str], dict[str, str]]:
        """Choose the roster of this round's sums; the sites that accept it, and a word about each other one."""
        chosen = self._parts.rosters.choose(frozenset(cohort.values()))
        self._use(chosen.roster)
        able = {node: site for node, site in cohort.items() if site in chosen.sites}
        return able, {site: UNCONFIRMED for site in cohort.values() if site not in chosen.sites}

    def _plan(
        self,
        purpose: Purpose,
        encoding: Encoding,
        weights: Flat,
        cohort: Mapping[int, str],
        number: int,
        sent: bytes | None = None,
    ) -> SumPlan:
        """``sent``: digest of the whole vector; absent where it was the model alone."""
        study, model = bytes.fromhex(self._study.digest), bytes.fromhex(weights_digest(weights))
        return SumPlan(study, purpose, self._site_ids(cohort), encoding, model, number, sent or model)

    def _sent(self, messages: Sequence[Message], weights: Flat) -> bytes | None:
        """Digest of the vector in ``messages``, the same in all; None where it is the model alone."""
        if not messages or not self._demands.beside.down(weights.size):
            return None
        (arrays,) = messages[0].content.array_records.values()
        return bytes.fromhex(weights_digest(as_numpy(arrays[TENSOR])))

    def _site_ids(self, cohort: Mapping[int, str]) -> tuple[int, ...]:
        return tuple(sorted(self._ids[site] for site in cohort.values() if site in self._ids))

    def _words(self, void: SumVoid, cohort: Mapping[int, str]) -> dict[str, str]:
        return {
            site: f"{VOID}{void.refusals.get(self._ids.get(site, 0), 'others are missing')}" for site in cohort.values()
        }

    def _exchange(self, cohort: Mapping[int, str]) -> GridExchange:
        nodes = {self._ids[site]: node for node, site in cohort.items() if site in self._ids}
        size = sum(segment.length for segment in self._clips.segments) * int(self._ring) // 8
        deadline_s = self._study.secure_aggregation.phase_deadline_s
        return GridExchange(self._stages, nodes, deadline_s=deadline_s, vector_bytes=size)


def _clip(study: Study, parts: SecureParts) -> Clip | None:
    """The clip that follows the updates, where the study asks for one."""
    if not isinstance(study.privacy, ClientLevel) or study.privacy.adaptive_clip is None:
        return None
    memory = None if parts.memory is None else parts.memory.with_name("clip.json")
    return Clip(study.privacy, study.privacy.adaptive_clip, memory)
