"""Any strategy of the mean under secure aggregation: it gets the sum of a round as one virtual site's reply.

That a strategy whose answer is a function of the mean needs no more than this is why Flower's and MedFL's own run
unchanged, whether sums come in clear or masked (Bonawitz et al. 2017, https://doi.org/10.1145/3133956.3133982).
"""

from __future__ import annotations

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Message

from medfl.shared.algorithms.needs import SUM_ONLY, Demands, Needs
from medfl.shared.errors import ConfigError
from medfl.shared.privacy.settings import NoPrivacy
from medfl.shared.secagg.limits import LARGEST_COHORT
from medfl.shared.secagg.roster import Roster
from medfl.shared.study import Study
from medfl.shared.weights import Flat
from medfl.strategies.replies import as_reply

_PRIVATE = "choose privacy mode dp-sgd or client-level"


def require_sum_suffices(study: Study) -> None:
    """Look whether the study's strategy can do with one sum a round, where the study hides all else.

    Raises:
        ConfigError: it needs single updates, or answers of several rounds in one sum; with the alternatives.
    """
    if study.secure_aggregation.mode == "none":
        return
    name, demands = study.strategy.name, study.demands
    instead = f"choose {SUM_ONLY}, or secure_aggregation mode none where every site's policy allows it"
    if demands.asynchronous:
        raise ConfigError(
            f"strategy {name} takes answers as they come, and a secure sum is over all of one round: {instead}"
        )
    if demands.sees is Needs.SINGLE_UPDATES:
        raise ConfigError(f"strategy {name} compares single updates, which secure aggregation hides: {instead}")


def require_sums_come_about(study: Study, roster: Roster) -> None:
    """Look whether a round of ``study`` asks as many sites of ``roster`` as a secure sum can be over.

    Raises:
        ConfigError: it asks too many or too few, or draws them where the sums are over those of the first round only;
            with what to set.
    """
    if study.secure_aggregation.mode == "none":
        return
    sites, least = len(roster.members), roster.minimum_cohort
    asked = min(study.rounds.sites_per_round or sites, sites)
    private = not isinstance(study.privacy, NoPrivacy)
    if least <= asked <= LARGEST_COHORT and (private or asked == sites):
        return
    if least <= asked <= LARGEST_COHORT:
        # Sites scale their updates by one sum of weights; a second one would tell what the difference weighs.
        raise ConfigError(
            f"rounds.sites_per_round: draws {asked} of the consortium's {sites} sites, and without differential "
            f"privacy secure sums are over sites of the first round only: {_PRIVATE}"
            + (", or leave it out" if sites <= LARGEST_COHORT else "")
        )
    if sites < least:
        way = "approve more sites first"
    elif asked < least:
        way = f"set rounds.sites_per_round: {least} or more"
    else:
        way = f"set rounds.sites_per_round: {LARGEST_COHORT} or fewer" + ("" if private else f", and {_PRIVATE}")
    raise ConfigError(
        f"a round would ask {asked} of the consortium's {sites} sites, and a secure sum is over {least} to "
        f"{LARGEST_COHORT}: {way}"
    )


def virtual_reply(sent: Flat, mean: Flat, weight: float, demands: Demands) -> Message:
    """The one reply that stands for all sites of a round.

    Args:
        sent: the weights that the round began from, float32 (values,).
        mean: the weighted mean of the sites' updates, and what goes beside it, float32 (values or more,).
        weight: the sum of the sites' weights.
        demands: of the strategy that gets it: the update as it is, or the weights that it leads to.
    """
    return as_reply(mean if demands.takes_updates else sent + mean, weight)
