"""A round of client-level privacy, from plan to release: ordinary training, one clip, this site's share of noise."""

from __future__ import annotations

import logging
import math
import secrets

import torch

from medfl.client.data.tensors import TensorSet
from medfl.client.privacy.ledger import Charge, Ledger
from medfl.client.privacy.randomness import SecureGenerator
from medfl.client.privacy.site_noise import clipped_and_noised, noised_half
from medfl.client.training.charged import PrivateRound
from medfl.client.training.local import Given, Progress, train_local
from medfl.client.workbench import Bench
from medfl.shared.privacy.accounting import epsilon
from medfl.shared.privacy.adaptive_clip import count_noise, number_within
from medfl.shared.privacy.noised_encoding import check_room_for_noise, clip_of_round
from medfl.shared.privacy.plan import TrainingPlan, plan_client_level
from medfl.shared.privacy.settings import ClientLevel
from medfl.shared.secagg.encoding import Encoding
from medfl.shared.study import Study
from medfl.shared.weights import Flat, weights_digest

log = logging.getLogger("medfl.site")


def fix_client_level_plan(
    ledger: Ledger, study: Study, settings: ClientLevel, *, patients: int, survivors: int, values: int
) -> TrainingPlan:
    """What the ledger is to charge for each round; recorded the first time, with a warning that says what it costs.

    Args:
        ledger: the site's.
        study: whose plan it is.
        settings: its privacy.
        patients: of this site.
        survivors: least number of sites whose sum can be opened.
        values: of one update.

    Raises:
        ConfigError: the noise does not keep the study's promise over all rounds, or delta is above one over patients.
    """
    known = ledger.plan(study.digest)
    if known is not None:
        return known
    plan = plan_client_level(settings, rounds=study.rounds.count, patients=patients)
    noise = settings.noise_multiplier * math.sqrt(values) / survivors
    if (adaptive := settings.adaptive_clip) is not None:
        log.info(
            "the clip of study %s follows the updates; the count of those within it has noise of %.3g sites, where a "
            "sum has %d and more",
            study.name,
            count_noise(settings, adaptive),
            survivors,
        )
    log.warning(
        "study %s hides whether a site took part, at epsilon %g; each patient here is charged epsilon %.3g. With %d "
        "sites the noise on the mean update is %.3g times as long as the clip norm: at 1 and above it drowns what a "
        "round learns",
        study.name,
        settings.epsilon,
        epsilon([plan.round_cost.times(study.rounds.count)], settings.delta),
        survivors,
        noise,
    )
    return ledger.fix_plan(study.digest, plan, patients=patients)


def train_client_level(
    ledger: Ledger,
    bench: Bench,
    study: Study,
    settings: ClientLevel,
    data: TensorSet,
    given: Given,
    *,
    round_number: int,
    survivors: int,
    encoding: bytes,
    progress: Progress | None = None,
) -> tuple[PrivateRound, Flat | None]:
    """Charge one round, train it, and return the clipped and noised update, and what the site keeps.

    The noise is part of the result, drawn once: the same answer sent again is the same bytes. ``encoding`` is what the
    update will be summed with; it names the round's clip where it follows the updates.

    Raises:
        ProtocolError: it names none, or would take the noise away. Nothing was charged then.
        PolicyRefusal: the budget does not allow the round, or the ledger is damaged, busy or cannot be written.
        TrainingError: training diverged.
    """
    patients = int(torch.unique(data.patients).numel())
    plan = fix_client_level_plan(
        ledger, study, settings, patients=patients, survivors=survivors, values=bench.layout.length
    )
    parsed, adaptive = Encoding.parse(encoding), settings.adaptive_clip
    check_room_for_noise(parsed, settings)
    clip = clip_of_round(parsed.scalars, settings)
    training = secrets.token_hex(8)
    ledger.charge(Charge(study.digest, round_number, training, plan.round_cost))
    order = torch.Generator(data.labels.device).manual_seed(secrets.randbits(63))
    local = train_local(bench, data, study, given, generator=order, round_number=round_number, progress=progress)
    generator, noised = SecureGenerator(), dict[str, float]()
    update = clipped_and_noised(
        local.update,
        clip_norm=clip,
        noise_multiplier=settings.noise_multiplier,
        survivors=survivors,
        generator=generator,
    )
    if adaptive is not None:
        spread = count_noise(settings, adaptive)
        noised[number_within(clip)] = noised_half(
            local.update, clip_norm=clip, count_noise=spread, survivors=survivors, generator=generator
        )
    ledger.release(study.digest, training, digest=weights_digest(update), size=update.nbytes)
    return PrivateRound(update, ledger.spent(study.digest), plan, noised), local.kept
