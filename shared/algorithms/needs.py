"""What each algorithm asks of a round: what the coordinator sees, what travels beside the model, what sites keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from medfl.shared.algorithms.settings import (
    AdaptiveSettings,
    BulyanSettings,
    DittoSettings,
    FedAvgMSettings,
    FedAvgSettings,
    FedBNSettings,
    FedBuffSettings,
    FedDCSettings,
    FedDynSettings,
    FedNovaSettings,
    FedProxSettings,
    GeometricMedianSettings,
    KrumSettings,
    MedianSettings,
    MoonSettings,
    PersonalLayersSettings,
    QFedAvgSettings,
    ScaffoldSettings,
    StrategySettings,
    TrimmedMeanSettings,
)

SUM_ONLY = (
    "fedavg, fedprox, fedavgm, fedadam, fedyogi, fedadagrad, fedbn, personal-layers, scaffold, fednova, feddyn, feddc, "
    "ditto or moon"
)
"""Algorithms that run under secure aggregation, in words."""


class Needs(Enum):
    """What a strategy must see of a round."""

    SUM = "the weighted mean of all updates"
    SINGLE_UPDATES = "each site's update by itself"


class Beside(Enum):
    """What travels beside the model."""

    NOTHING = "nothing"
    ONE_VALUE = "one number with each update"
    A_MODEL = "a second vector as long as the model, in both directions"

    def down(self, length: int) -> int:
        """Values sent to a site beside a model of ``length`` values."""
        return length if self is Beside.A_MODEL else 0

    def up(self, length: int) -> int:
        """Values a site sends beside an update of ``length`` values."""
        match self:
            case Beside.NOTHING:
                return 0
            case Beside.ONE_VALUE:
                return 1
            case Beside.A_MODEL:
                return length


@dataclass(frozen=True, slots=True)
class Demands:
    """All that an algorithm asks for."""

    sees: Needs = Needs.SUM
    beside: Beside = Beside.NOTHING
    site_state: bool = False  # the site keeps a vector from round to round
    settles: bool = False  # which the coordinator reckons with: it moves only when the site's answer was counted
    plain_sgd: bool = False  # its arithmetic holds for SGD only
    without_momentum: bool = False
    own_training: bool = False  # changes local training in a way that private training does not know
    no_statistics: bool = False  # would spoil the running statistics of batch norm
    takes_updates: bool = False  # the server half works on updates, not on weights
    asynchronous: bool = False  # takes answers from older models
    losses: bool = False  # needs each site's training loss
    sites: int = 1  # of a round; fewer make no model, or do not give what the algorithm is there for


def demands_of(strategy: StrategySettings) -> Demands:  # noqa: PLR0912 - one branch an algorithm
    """What ``strategy`` asks for."""
    match strategy:
        case FedAvgSettings() | FedProxSettings() | FedAvgMSettings() | AdaptiveSettings():
            return Demands()
        case FedBNSettings() | PersonalLayersSettings():
            return Demands(site_state=True)
        case ScaffoldSettings() | FedDCSettings():
            return Demands(
                beside=Beside.A_MODEL,
                site_state=True,
                settles=True,
                plain_sgd=True,
                without_momentum=True,
                own_training=True,
                takes_updates=True,
            )
        case FedNovaSettings():
            return Demands(
                beside=Beside.ONE_VALUE, plain_sgd=True, own_training=True, no_statistics=True, takes_updates=True
            )
        case FedDynSettings():
            return Demands(site_state=True, settles=True, own_training=True, no_statistics=True, takes_updates=True)
        case DittoSettings() | MoonSettings():
            return Demands(site_state=True, own_training=True)
        case FedBuffSettings():
            return Demands(takes_updates=True, asynchronous=True)
        case QFedAvgSettings():
            return Demands(sees=Needs.SINGLE_UPDATES, takes_updates=True, losses=True)
        case MedianSettings() | GeometricMedianSettings():
            return Demands(sees=Needs.SINGLE_UPDATES, takes_updates=True)
        case TrimmedMeanSettings(trim=trim):  # of fewer it would cut none: a mean in disguise
            return Demands(sees=Needs.SINGLE_UPDATES, takes_updates=True, sites=math.ceil(1 / trim))
        case KrumSettings(malicious=malicious, keep=keep):  # the paper's condition; without liars there is none
            sites = malicious + 2 + max(malicious + 1, keep) if malicious else 1
            return Demands(sees=Needs.SINGLE_UPDATES, takes_updates=True, sites=sites)
        case BulyanSettings(malicious=malicious):
            return Demands(sees=Needs.SINGLE_UPDATES, takes_updates=True, sites=4 * malicious + 3)
        case _ as never:
            assert_never(never)


def misfit(
    strategy: StrategySettings, *, optimizer: str, momentum: float, private: bool, norm: str | None, sites: int
) -> str | None:
    """Why ``strategy`` cannot run in such a study and what can, or None where it can.

    ``norm`` is the network's normalisation, ``sites`` the least number of sites of a round.
    """
    demands, name = demands_of(strategy), strategy.name
    if demands.plain_sgd and optimizer != "sgd":
        return f"strategy {name} is defined for training.optimizer sgd: use it, or strategy fedprox or feddyn"
    if demands.without_momentum and momentum:
        return f"strategy {name} is defined without training.momentum: set it to 0, or use strategy fednova or fedprox"
    if demands.own_training and private:
        return f"strategy {name} changes local training, which private training does not do: use {_PRIVATE}"
    if demands.asynchronous and private:
        return (
            f"strategy {name} does not run under differential privacy: the privacy ledgers of sites at work cannot be "
            f"compared before a round: use {_PRIVATE}"
        )
    if demands.no_statistics and norm == "batch":
        return f"strategy {name} would spoil batch norm's running statistics: use model.norm group or instance"
    if sites < demands.sites:
        return f"strategy {name} needs rounds.minimum_sites of at least {demands.sites}, or strategy median"
    return None


_PRIVATE = "fedavg, fedprox, fedavgm, fedadam, fedyogi or fedadagrad"
