"""A private round from plan to release: nothing trains uncharged, nothing leaves unrecorded."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from medfl.client.data.tensors import TensorSet
from medfl.client.privacy.ledger import Charge, Ledger, Spent
from medfl.client.privacy.refusals import refuse_unnoised_changes
from medfl.client.training.private import planned_units, require_promised_images, train_private
from medfl.client.workbench import Bench
from medfl.shared.metrics import Tally
from medfl.shared.privacy.plan import TrainingPlan, plan_training, warnings
from medfl.shared.privacy.settings import DpSgd
from medfl.shared.study import Study
from medfl.shared.weights import Flat, weights_digest

log = logging.getLogger("medfl.site")


@dataclass(frozen=True, slots=True)
class PrivateRound:
    """What one private round gave, and what the site has spent since."""

    update: Flat
    spent: Spent
    plan: TrainingPlan
    noised: Tally = field(default_factory=dict)  # numbers that go with the update, with noise of their own


def fix_plan(ledger: Ledger, study: Study, settings: DpSgd, data: TensorSet) -> TrainingPlan:
    """The site's plan for ``study``: recorded the first time, the same ever after. Warnings go to the log once.

    Raises:
        ConfigError: delta above one over the patients, or noise too small for the promised epsilon.
        DataError: a patient has more images than the study promises.
    """
    require_promised_images(data, settings)
    known = ledger.plan(study.digest)
    if known is not None:
        return known
    units, patients = planned_units(data, settings)
    rounds = study.rounds.count + settings.spare_rounds
    plan = plan_training(settings, units=units, patients=patients, rounds=rounds)
    for told in warnings(settings, plan, patients=patients, rounds=rounds):
        log.warning("%s", told)
    plan = ledger.fix_plan(study.digest, plan, patients=patients)
    _tell_budget(ledger, study, plan)
    return plan


def train_charged(
    ledger: Ledger,
    bench: Bench,
    study: Study,
    settings: DpSgd,
    data: TensorSet,
    *,
    round_number: int,
    weights: Flat,
    progress: Callable[[int, int], None] | None = None,
) -> PrivateRound:
    """Charge one round durably, train it on the weights in the bench, record the update's release durably.

    Raises:
        PolicyRefusal: the budget does not allow the round, the ledger is damaged, busy or cannot be written, or
            training changed something that got no noise.
    """
    plan = fix_plan(ledger, study, settings, data)
    training = secrets.token_hex(8)
    ledger.charge(Charge(study.digest, round_number, training, plan.round_cost))
    before = {name: value.clone() for name, value in bench.network.state_dict().items()}
    train_private(bench.network, data, study, settings, plan, round_number=round_number, progress=progress)
    refuse_unnoised_changes(before, bench.network)
    update = bench.update_from(weights)
    ledger.release(study.digest, training, digest=weights_digest(update), size=update.nbytes)
    return PrivateRound(update, ledger.spent(study.digest), plan)


def _tell_budget(ledger: Ledger, study: Study, plan: TrainingPlan) -> None:
    """What the site's administrator should know before the first round: spent, next cost, rounds left."""
    left = ledger.remaining(study.digest)
    tell = log.info if left.rounds_left >= study.rounds.count else log.warning
    tell(
        "study %s: each %s has spent epsilon %.3f of %g on it and %.3f in total; its next round brings that to %.3f "
        "and %.3f; %s of its %d rounds fit below every ceiling (noise multiplier %g, %d steps a round)",
        study.name,
        plan.unit.value,
        left.spent.study,
        plan.epsilon,
        left.spent.total,
        left.after_next_round.study,
        left.after_next_round.total,
        "all" if left.rounds_left >= study.rounds.count else left.rounds_left,
        study.rounds.count,
        plan.noise_multiplier,
        plan.steps_per_round,
    )
