"""How a round's results reach the coordinator: the interface that sums in clear and secure sums share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import ConfigRecord, Message

from medfl.shared.weights import Flat

TRAINED = "trained"
"""Outcome of a site whose update is in the round's result."""

Configure = Callable[[ConfigRecord], list[Message]]
"""The strategy's messages to the cohort for a given ``config`` record."""


@dataclass
class Collected:
    """What a training stage brought, in the form Flower's strategies aggregate."""

    replies: list[Message] = field(default_factory=list)  # one with the mean, or each site's own
    relative: bool = False  # the replies hold updates, not weights
    outcomes: dict[str, str] = field(default_factory=dict)  # site -> TRAINED or what went wrong
    tally: Mapping[str, float] = field(default_factory=dict)  # sums over sites, of what is released
    received_bytes: int = 0
    weights: dict[str, int] = field(default_factory=dict)  # site -> examples of its answer, where single ones are seen
    weight: float = 0.0  # of all answers together
    weight_of_all: float = 0.0  # of every site that takes part, where only sums are known

    @property
    def trained(self) -> int:
        """Number of sites in the result."""
        return sum(result == TRAINED for result in self.outcomes.values())


@dataclass
class Evaluated:
    """Sums of scores over all sites that release them, and by site where that is allowed."""

    tally: Mapping[str, float] = field(default_factory=dict)
    by_site: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    missed: bool = False
    """Whether no scores came although sites may have some: too few answered, or their sum could not be opened."""


class Collector(Protocol):
    """Brings in results. Holds one model in memory however many sites there are, unless single updates are asked for.

    ``quorum`` is the least number of sites whose results make a round; with fewer, ``replies`` is empty.
    """

    def train(
        self, number: int, weights: Flat, cohort: Mapping[int, str], configure: Configure, *, quorum: int
    ) -> Collected:
        """Let the cohort train round ``number`` from ``weights``."""
        ...

    def evaluate(self, number: int, weights: Flat, cohort: Mapping[int, str], configure: Configure) -> Evaluated:
        """Let the cohort score ``weights``."""
        ...

    def unfinished(self, weights: Flat, cohort: Mapping[int, str]) -> Collected | None:
        """The result of a round from ``weights`` that a killed coordinator had all but finished, if there is one."""
        ...

    def settled(self) -> None:
        """The round's result is safe in a checkpoint."""
        ...
