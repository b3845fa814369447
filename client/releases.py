"""Everything that leaves a site in a study, and what protects it: told when a study is accepted, and in the manual."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from medfl.client.policy import Policy
from medfl.shared.algorithms.needs import Beside
from medfl.shared.privacy.settings import ClientLevel, DpSgd, NoPrivacy
from medfl.shared.study import Study


class Treatment(StrEnum):
    """What is done to a number before it leaves, from the safest to the barest."""

    OFF = "stays here"
    PLANNED = "planned"  # fixed by the study beforehand: depends on no patient
    NOISED = "noised"  # differential privacy covers it, and the ledger has charged it
    SUMMED = "summed"  # exact, but only the sum over all sites becomes known
    EXACT = "exact"


@dataclass(frozen=True, slots=True)
class Release:
    """One thing that leaves, or that one might expect to leave."""

    what: str
    treatment: Treatment


def releases(study: Study, policy: Policy) -> tuple[Release, ...]:
    """Each thing that ``study`` could make a site with ``policy`` release, and how it is treated."""
    private = not isinstance(study.privacy, NoPrivacy)
    secure = study.secure_aggregation.mode != "none"
    bare = Treatment.SUMMED if secure else Treatment.EXACT
    if private:
        scores = Treatment.OFF
    elif secure:
        scores = Treatment.SUMMED
    else:
        scores = Treatment.EXACT if policy.release_site_metrics else Treatment.OFF
    return (
        Release("update of the trained weights", Treatment.NOISED if private else bare),
        Release("buffers and weights that are not trained", Treatment.PLANNED if private else bare),
        Release("weight in the mean", Treatment.PLANNED if private else bare),
        Release("the strategy's numbers beside the update", _beside(study, bare)),
        Release("training loss", scores),
        Release("scores on held-out patients", scores),
        Release("whether the update was within the clip", _within(study)),
        Release("how many values the encoding cut", _cut(study)),
        Release("numbers of patients, of drawn, clipped and dropped units", Treatment.OFF),
        Release("class weights, intensity statistics, which round's model is taken", Treatment.PLANNED),
        Release("the ledger's length and hash", Treatment.NOISED if private else Treatment.OFF),
        Release("that something failed or was refused, as a code", Treatment.EXACT),
        Release("the time an answer takes", Treatment.EXACT),
    )


def told(study: Study, policy: Policy) -> str:
    """The releases as one line of a log, by treatment, without what stays."""
    found = releases(study, policy)
    parts = []
    for treatment in Treatment:
        names = [release.what for release in found if release.treatment is treatment]
        if names and treatment is not Treatment.OFF:
            parts.append(f"{treatment.value}: {', '.join(names)}")
    return "; ".join(parts)


def _beside(study: Study, bare: Treatment) -> Treatment:
    return Treatment.OFF if study.demands.beside is Beside.NOTHING else bare


def _within(study: Study) -> Treatment:
    follows = isinstance(study.privacy, ClientLevel) and study.privacy.adaptive_clip is not None
    return Treatment.NOISED if follows else Treatment.OFF


def _cut(study: Study) -> Treatment:
    if study.secure_aggregation.mode == "none":
        return Treatment.OFF
    match study.privacy:
        case NoPrivacy():
            return Treatment.SUMMED
        case DpSgd():
            return Treatment.NOISED  # it is counted on the noised update
        case ClientLevel():
            return Treatment.PLANNED  # none: the encoding has room for the noise
