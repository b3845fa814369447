"""Which answer of each site is in the model, and for what share of all sites a round's answers stand."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from medfl.server.collector import TRAINED, Collected


@dataclass
class Answers:
    """What the coordinator remembers of each site from round to round; goes into the checkpoint."""

    counted: dict[str, int] = field(default_factory=dict)  # site -> last round whose model holds its answer
    examples: dict[str, int] = field(default_factory=dict)  # site -> what its last answer weighed, where that is seen

    def note(self, number: int, collected: Collected) -> None:
        """The answers of ``collected`` are in the model of round ``number``."""
        self.counted |= {site: number for site, what in collected.outcomes.items() if what == TRAINED}

    def share(self, collected: Collected, everyone: Collection[str]) -> float:
        """By weight, the part of ``everyone`` whose answers are in ``collected``.

        Where single weights are seen, a site that never answered counts as much as the mean of the others. Under
        secure aggregation the sum of all weights is known; else sites are counted.
        """
        self.examples |= collected.weights
        if collected.weight_of_all:
            return min(1.0, collected.weight / collected.weight_of_all)
        here = {site for site, what in collected.outcomes.items() if what == TRAINED}
        usual = fmean(self.examples.values()) if self.examples else 1.0
        total = {site: self.examples.get(site, usual) for site in here | set(everyone)}
        return sum(total[site] for site in here) / sum(total.values()) if here else 0.0

    def state(self) -> dict[str, dict[str, int]]:
        """As JSON."""
        return {"counted": dict(self.counted), "examples": dict(self.examples)}

    @classmethod
    def of(cls, state: Mapping[str, Mapping[str, int]]) -> Answers:
        """From what :meth:`state` gave."""
        return cls(dict(state.get("counted", {})), dict(state.get("examples", {})))
