"""From a study's ``strategy:`` section to the Flower strategy that turns updates into a model."""

from __future__ import annotations

from typing import Any

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    Strategy,
)

from medfl.shared.algorithms.needs import Needs
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
    TrimmedMeanSettings,
)
from medfl.shared.study import Study
from medfl.strategies.bulyan import bulyan
from medfl.strategies.fed_buff import fed_buff
from medfl.strategies.fed_dc import MEAN_UPDATE, fed_dc
from medfl.strategies.fed_dyn import fed_dyn
from medfl.strategies.fed_nova import fed_nova
from medfl.strategies.geometric_median import geometric_median
from medfl.strategies.mean import Mean
from medfl.strategies.q_fed_avg import q_fed_avg
from medfl.strategies.rule import RuleStrategy
from medfl.strategies.scaffold import CONTROL, scaffold
from medfl.strategies.secure_aggregation import require_sum_suffices

__all__ = ["Needs", "build_strategy", "needs_of"]


def needs_of(study: Study) -> Needs:
    """What the study's strategy must see of a round.

    Raises:
        ConfigError: secure aggregation hides it.
    """
    require_sum_suffices(study)
    return study.demands.sees


def build_strategy(study: Study) -> Strategy:  # noqa: PLR0912 - one branch an algorithm
    """A fresh strategy for ``study``. Node sampling is the round loop's; strategies take every node they are shown."""
    needs_of(study)
    settings = study.strategy
    match settings:
        case (
            FedAvgSettings()
            | FedProxSettings()
            | FedBNSettings()
            | PersonalLayersSettings()
            | DittoSettings()
            | MoonSettings()
        ):  # what differs of these runs at the site
            return Mean(**_TAKE_ALL)
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
        case ScaffoldSettings(learning_rate=rate):
            return RuleStrategy(scaffold(learning_rate=rate), sends=CONTROL)
        case FedNovaSettings():
            return RuleStrategy(fed_nova)
        case FedDCSettings():
            return RuleStrategy(fed_dc, sends=MEAN_UPDATE)
        case FedDynSettings(alpha=alpha):
            return RuleStrategy(fed_dyn(alpha=alpha))
        case FedBuffSettings(learning_rate=rate):
            return RuleStrategy(fed_buff(learning_rate=rate))
        case QFedAvgSettings(q=q):
            return RuleStrategy(q_fed_avg(q=q, learning_rate=study.training.learning_rate))
        case GeometricMedianSettings(iterations=iterations):
            return RuleStrategy(geometric_median(iterations=iterations))
        case BulyanSettings(malicious=malicious):
            return RuleStrategy(bulyan(malicious=malicious))
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
