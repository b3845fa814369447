"""Results in clear: the coordinator sees each update and adds it at once."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan

from flwr.app import Message

from medfl.server.collector import TRAINED, Collected, Configure, Evaluated
from medfl.server.safeguards import shortened
from medfl.server.stage import Stages
from medfl.server.summation import FixedPointSum
from medfl.shared.messages import EvaluateReply, Kind, TrainReply, request_config
from medfl.shared.metrics import EXAMPLES, LOSS, add, check_names, read, tally_names
from medfl.shared.study import Study
from medfl.shared.weights import Flat
from medfl.strategies.build import Needs
from medfl.strategies.replies import as_reply
from medfl.strategies.secure_aggregation import virtual_reply

_EVALUATED = "evaluated"


class ClearCollector:
    """Sums updates as they arrive, or keeps each one where the strategy compares them."""

    def __init__(self, study: Study, stages: Stages, needs: Needs) -> None:
        self._study = study
        self._stages = stages
        self._needs = needs
        self._demands = study.demands

    def train(
        self, number: int, weights: Flat, cohort: Mapping[int, str], configure: Configure, *, quorum: int
    ) -> Collected:
        """Let the cohort train and add what comes back."""
        collected = Collected()
        total = FixedPointSum(weights.size + self._demands.beside.up(weights.size))
        single: dict[str, Message] = {}
        tallies: dict[str, Mapping[str, float]] = {}

        def take(site: str, reply: Message) -> str:
            trained = TrainReply.parse(reply.content)
            check_names(trained.tally, (LOSS, EXAMPLES))
            update = shortened(trained.update, self._study.safeguards, length=weights.size, whose=f"site {site}")
            total.add(update, trained.examples)
            if self._needs is Needs.SINGLE_UPDATES:
                loss = read(trained.tally).get("loss", nan) if self._demands.losses else None
                single[site] = as_reply(update, trained.examples, loss=loss)
            collected.received_bytes += trained.update.nbytes
            collected.weights[site] = trained.examples
            tallies[site] = trained.tally
            return TRAINED

        messages = configure(request_config(self._study.digest, number))
        self._stages.run(number, "training", messages, cohort, collected.outcomes, take=take, quorum=quorum)
        collected.tally, collected.weight = _summed(tallies), total.weight
        if collected.trained >= quorum and single:
            # By name, so that no order of arrival shows; updates and not weights, because distances between nearly
            # equal weights drown in rounding.
            collected.replies, collected.relative = [single[site] for site in sorted(single)], True
        elif collected.trained >= quorum:
            collected.replies = [virtual_reply(weights, total.mean(), total.weight, self._demands)]
            collected.relative = self._demands.takes_updates
        return collected

    def evaluate(self, number: int, weights: Flat, cohort: Mapping[int, str], configure: Configure) -> Evaluated:
        """Let the cohort score the weights and add what is released."""
        tallies: dict[str, Mapping[str, float]] = {}

        def take(site: str, reply: Message) -> str:
            if tally := EvaluateReply.parse(reply.content).tally:
                check_names(tally, tally_names(self._study.scoring, self._study.data.classes))
                tallies[site] = tally
            return _EVALUATED

        outcomes: dict[str, str] = {}
        messages = configure(request_config(self._study.digest, number))
        self._stages.run(number, Kind.EVALUATE.value, messages, cohort, outcomes, take=take)
        return Evaluated(_summed(tallies), tallies, missed=_EVALUATED not in outcomes.values())

    def unfinished(self, weights: Flat, cohort: Mapping[int, str]) -> Collected | None:
        """Nothing is kept: the round is run again, and sites repeat their answers without training."""
        return None

    def settled(self) -> None:
        """Nothing was kept."""


def _summed(tallies: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Sums over sites, by name, so that no order of arrival shows in the last bits of a loss."""
    return add(tallies[site] for site in sorted(tallies))
