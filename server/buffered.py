"""Answers as they come: a round closes as soon as enough are there, and who is still at work counts in a later one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, Message

from medfl.server.clear import ClearCollector
from medfl.server.collector import TRAINED, Collected, Configure, Evaluated
from medfl.server.exchange import NO_ANSWER, Exchange
from medfl.server.safeguards import shortened
from medfl.server.stage import Stages
from medfl.server.summation import FixedPointSum
from medfl.shared.algorithms.fed_buff import staleness_weight
from medfl.shared.messages import TrainReply, request_config
from medfl.shared.metrics import EXAMPLES, LOSS, add, check_names
from medfl.shared.study import Study
from medfl.shared.weights import Flat
from medfl.strategies.build import Needs
from medfl.strategies.replies import as_reply

AT_WORK = "still training"


@dataclass(frozen=True, slots=True)
class _Busy:
    """A site at work: its name, and the round of the model it was given."""

    site: str
    since: int


class BufferedCollector:
    """Asks every site that is free, and takes the first ``quorum`` answers, whichever model they began from.

    What is at work when the coordinator is killed is asked for anew, from the newest model.
    """

    def __init__(self, study: Study, stages: Stages, *, staleness: float) -> None:
        self._study = study
        self._stages = stages
        self._staleness = staleness
        self._in_clear = ClearCollector(study, stages, Needs.SUM)
        self._busy: dict[int, _Busy] = {}  # by node
        self._exchange = Exchange(
            stages.grid, stages.pace, "training", online=stages.admission.online, stop=stages.stop
        )

    def train(
        self, number: int, weights: Flat, cohort: Mapping[int, str], configure: Configure, *, quorum: int
    ) -> Collected:
        """Let those of the cohort that are free train, and add the first ``quorum`` answers of all at work."""
        collected, tallies = Collected(), list[Mapping[str, float]]()
        total = FixedPointSum(weights.size)
        messages = [
            message
            for message in configure(request_config(self._study.digest, number))
            if message.metadata.dst_node_id not in self._busy
        ]
        asked = {message.metadata.dst_node_id for message in messages}
        self._busy |= {node: _Busy(cohort[node], number) for node in asked}
        outcomes = collected.outcomes
        outcomes.update({busy.site: AT_WORK for busy in self._busy.values()})

        def take(site: str, reply: Message) -> str:
            trained = TrainReply.parse(reply.content)
            check_names(trained.tally, (LOSS, EXAMPLES))
            update = shortened(trained.update, self._study.safeguards, length=weights.size, whose=f"site {site}")
            behind = number - self._busy[reply.metadata.src_node_id].since
            total.add(update * np.float32(staleness_weight(behind, exponent=self._staleness)), trained.examples)
            collected.received_bytes += update.nbytes
            collected.weights[site] = trained.examples
            tallies.append(trained.tally)
            return TRAINED

        def tell() -> None:
            answered = [site for site, word in outcomes.items() if word != AT_WORK]
            self._stages.reporter.stage(number, "training", answered, list(outcomes))

        tell()
        for reply in self._exchange.run(messages):
            node = reply.metadata.src_node_id
            if node not in self._busy:
                continue
            site = self._busy[node].site
            outcomes[site], final, _ = self._stages.sort(node, site, reply, take)
            if final:
                del self._busy[node]
                tell()
            if total.terms >= quorum:
                break
        for node in self._exchange.late:
            self._stages.admission.forget(node)
        self._exchange.late.clear()
        for node in set(self._busy) - self._exchange.waits_for:
            outcomes[self._busy.pop(node).site] = NO_ANSWER
        collected.tally, collected.weight = add(tallies), total.weight
        if total.terms >= quorum:
            collected.replies, collected.relative = [as_reply(total.mean(), total.weight)], True
        return collected

    def evaluate(self, number: int, weights: Flat, cohort: Mapping[int, str], configure: Configure) -> Evaluated:
        """Let those of the cohort that are free score the weights; after the last round, everyone once done."""
        free = cohort
        if number < self._study.rounds.count:
            free = {node: site for node, site in cohort.items() if node not in self._busy}

        def to_the_free(config: ConfigRecord) -> list[Message]:
            return [message for message in configure(config) if message.metadata.dst_node_id in free]

        return self._in_clear.evaluate(number, weights, free, to_the_free)

    def unfinished(self, weights: Flat, cohort: Mapping[int, str]) -> Collected | None:
        """Nothing is kept."""
        return None

    def settled(self) -> None:
        """Nothing was kept."""
