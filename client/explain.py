"""A study in words, for the person who decides whether their hospital takes part."""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Sequence

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from medfl.client.approvals import Approvals, Standing
from medfl.client.policy import Policy
from medfl.client.releases import Treatment, releases
from medfl.shared.algorithms.travel import build_study_network, layouts
from medfl.shared.errors import PolicyRefusal
from medfl.shared.privacy.settings import ClientLevel, DpSgd, NoPrivacy
from medfl.shared.study import Study

WIDTH = 80
_LABEL = 13

_TREATED = {
    Treatment.NOISED: "with noise",
    Treatment.SUMMED: "in the sum of all sites only",
    Treatment.PLANNED: "as planned beforehand",
    Treatment.EXACT: "exactly",
}


def explain(
    study: Study, approvals: Approvals, policy: Policy, *, spent_total: float, today: datetime.date
) -> list[str]:
    """Lines of at most 80 characters: what is trained on what, what leaves, at which price, and who decides.

    ``spent_total`` is the epsilon that this site's patients have spent over all studies. Builds the network once, for
    its size.
    """
    parts = [
        ("state", _state(study, approvals)),
        ("purpose", study.purpose or "not written"),
        ("responsible", study.responsible or "not written"),
        ("legal basis", study.legal_basis or "not written"),
        ("ethics vote", study.ethics or "not written"),
        ("recipients", study.recipients or "not written"),
        ("last day", str(study.last_day or "none: until it has ended")),
        ("images", _images(study)),
        ("training", _training(study)),
        ("privacy", _privacy(study)),
        ("budget", _budget(study, policy, spent_total)),
        ("aggregation", _aggregation(study, policy)),
        *(("leaves", text) for text in _leaves(study, policy)),
        ("how much", _size(study)),
        ("policy", _verdict(study, policy, today)),
    ]
    lines = [f"study {study.name}", *_row("digest", study.digest)]
    last = ""
    for label, text in parts:
        lines += _row(label if label != last else "", text)
        last = label
    return lines


def _row(label: str, text: str) -> list[str]:
    """``label`` and the wrapped ``text`` beside it. What the coordinator wrote holds no control characters."""
    wrapped = [piece for line in text.splitlines() for piece in textwrap.wrap(line, WIDTH - _LABEL - 2)] or [""]
    return [f"  {label:{_LABEL}}{wrapped[0]}"[:WIDTH], *(" " * (_LABEL + 2) + piece for piece in wrapped[1:])]


def _state(study: Study, approvals: Approvals) -> str:
    standing, decision = approvals.standing(study.digest, study), approvals.decision(study.digest)
    if decision is None:
        return standing.value
    ethics = f", ethics vote {decision.ethics}" if decision.ethics else ""
    return f"{standing.value} by {decision.by} on {decision.at:%Y-%m-%d %H:%M} UTC{ethics}"


def _images(study: Study) -> str:
    data = study.data
    size = " x ".join(map(str, data.preprocessing.size))
    spacing = data.preprocessing.spacing_mm
    resolution = f" at {' x '.join(f'{value:g}' for value in spacing)} mm" if spacing else ""
    shape = "slices" if data.dimensions == 2 else "volumes"
    channels = f", {data.channels} channels" if data.channels > 1 else ""
    return f"{data.modality.value}, {shape} of {size}{resolution}{channels}; classes: {_listed(data.classes)}"


def _training(study: Study) -> str:
    training, rounds = study.training, study.rounds
    if isinstance(study.privacy, DpSgd):
        privacy = study.privacy
        length = f"{privacy.steps_per_round} steps, each on {privacy.expected_batch:g} {privacy.unit.value}s on average"
    else:
        length = _counted(training.epochs, "epoch") if training.epochs else _counted(training.steps or 0, "step")
        length += f" in batches of {training.batch_size}"
    head = ", last layer only" if training.train_only == "head" else ""
    return (
        f"{study.task.value} with {study.model.name}{head}; {_counted(rounds.count, 'round')} of {length}, at least "
        f"{_counted(rounds.minimum_sites, 'site')} each; strategy {study.strategy.name}"
    )


def _privacy(study: Study) -> str:
    match study.privacy:
        case NoPrivacy():
            return (
                "none: no noise. Who sees this site's updates, or a model made of few sites', may learn about single "
                "patients"
            )
        case DpSgd() as privacy:
            return (
                f"differential privacy for each {privacy.unit.value}: epsilon {privacy.epsilon:g} at delta "
                f"{privacy.delta:g} over the whole study, by noise added here in every step"
            )
        case ClientLevel() as privacy:
            return (
                f"differential privacy of the whole site's share: epsilon {privacy.epsilon:g} at delta "
                f"{privacy.delta:g}, by noise of all sites together"
            )


def _budget(study: Study, policy: Policy, spent_total: float) -> str:
    total = f"{spent_total:.3g} of the {policy.max_epsilon_total:g} that this site allows in all are spent"
    if isinstance(study.privacy, NoPrivacy):
        return f"costs none of it; {total}"
    return f"at most {study.privacy.epsilon:g}, and this site allows {policy.max_epsilon_per_study:g} a study; {total}"


def _aggregation(study: Study, policy: Policy) -> str:
    if study.secure_aggregation.mode == "none":
        return "in clear: the coordinator sees this site's own update"
    return (
        f"secure: the coordinator learns the sum over {policy.minimum_cohort} sites or more, and no single update "
        "(policy.minimum_cohort)"
    )


def _leaves(study: Study, policy: Policy) -> list[str]:
    found = releases(study, policy)
    said = [
        f"{words}: {_listed([release.what for release in found if release.treatment is treatment])}"
        for treatment, words in _TREATED.items()
        if any(release.treatment is treatment for release in found)
    ]
    stays = _listed([release.what for release in found if release.treatment is Treatment.OFF])
    return [*said, f"not at all: images, names, identifiers{', ' + stays if stays else ''}"]


def _size(study: Study) -> str:
    length = layouts(study, build_study_network(study))[0].length
    beside = study.demands.beside
    width = 4 if study.secure_aggregation.mode == "none" else study.secure_aggregation.ring_bits / 8
    up, down = (length + beside.up(length)) * width / 1e6, (length + beside.down(length)) * 4 / 1e6
    count = study.rounds.count
    return (
        f"{length:,} values: {up:.3g} MB leave and {down:.3g} MB come each round, {count} times at most: "
        f"{up * count:.3g} MB leave in all"
    )


def _verdict(study: Study, policy: Policy, today: datetime.date) -> str:
    try:
        policy.permit_day(study, today=today)
        policy.permit(study)
    except PolicyRefusal as refusal:
        return f"forbids it, approved or not: {refusal}"
    hours = f", at these hours: {'; '.join(policy.hours)}" if policy.hours else ""
    return f"permits it once it is approved{hours}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def next_step(study: Study, standing: Standing) -> str:
    """What to type next."""
    short = study.digest[:12]
    if standing.runs:
        return f'to leave it: medfl-client --site FILE withdraw {short} --by "NAME"'
    return f'to take part: medfl-client --site FILE approve {short} --by "NAME" [--ethics NUMBER]'
