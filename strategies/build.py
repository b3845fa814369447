"""From a study's ``strategy:`` section to the Flower strategy that turns updates into a model."""

from __future__ import annotations

from enum import Enum
from typing import Any

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    Strategy,
)

from medfl.shared.algorithms.settings import (
    AdaptiveSettings,
    FedAvgMSettings,
    FedAvgSettings,
    FedBNSettings,
    FedProxSettings,
    KrumSettings,
    MedianSettings,
    TrimmedMeanSettings,
)
from medfl.shared.errors import ConfigError
from medfl.shared.study import Study


class Needs(Enum):
    """What a strategy must see of a round."""

    SUM = "the weighted mean of all updates"
    SINGLE_UPDATES = "each site's update by itself"


def needs_of(study: Study) -> Needs:
    """What the study's strategy needs.

    Raises:
        ConfigError: it needs single updates, and secure aggregation hides them.
    """
    match study.strategy:
        case TrimmedMeanSettings() | MedianSettings() | KrumSettings():
            needs = Needs.SINGLE_UPDATES
        case _:
            needs = Needs.SUM
    if needs is Needs.SINGLE_UPDATES and study.secure_aggregation.mode != "none":
        raise ConfigError(
            f"strategy {study.strategy.name} compares single updates, which secure aggregation hides: choose fedavg, "
            "fedprox, fedavgm, fedadam, fedyogi, fedadagrad or fedbn, or secure_aggregation mode none where every "
            "site's policy allows it"
        )
    return needs


def build_strategy(study: Study) -> Strategy:
    """A fresh strategy for ``study``. Node sampling is the round loop's; strategies take every node they are shown."""
    needs_of(study)
    settings = study.strategy
    match settings:
        case FedAvgSettings() | FedProxSettings() | FedBNSettings():  # what differs of these runs at the site
            return FedAvg(**_TAKE_ALL)
        case FedAvgMSettings():
            return FedAvgM(server_learning_rate=settings.learning_rate, server_momentum=settings.momentum, **_TAKE_ALL)
        case AdaptiveSettings(name="fedadam"):
            return FedAdam(
                eta=settings.learning_rate,
                beta_1=settings.beta_1,
                beta_2=settings.beta_2,
                tau=settings.tau,
                **_TAKE_ALL,
            )
        case AdaptiveSettings(name="fedyogi"):
            return FedYogi(
                eta=settings.learning_rate,
                beta_1=settings.beta_1,
                beta_2=settings.beta_2,
                tau=settings.tau,
                **_TAKE_ALL,
            )
        case AdaptiveSettings():
            return FedAdagrad(eta=settings.learning_rate, tau=settings.tau, **_TAKE_ALL)
        case TrimmedMeanSettings():
            return FedTrimmedAvg(beta=settings.trim, **_TAKE_ALL)
        case MedianSettings():
            return FedMedian(**_TAKE_ALL)
        case KrumSettings(keep=1):
            return Krum(num_malicious_nodes=settings.malicious, **_TAKE_ALL)
        case KrumSettings():
            return MultiKrum(num_malicious_nodes=settings.malicious, num_nodes_to_select=settings.keep, **_TAKE_ALL)


_TAKE_ALL: dict[str, Any] = {
    "fraction_train": 1.0,
    "fraction_evaluate": 1.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
}
