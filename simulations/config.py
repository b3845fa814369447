"""What ``medfl-sim --config`` reads: a study, virtual sites with their data, what to vary and what to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, ValidationError, model_validator

from medfl.client.data.settings import DataSettings, SplitSettings
from medfl.shared.algorithms.settings import FedAvgSettings
from medfl.shared.config import LocalPath, Settings
from medfl.shared.privacy.settings import NoPrivacy
from medfl.shared.secagg.exchange import Phase
from medfl.shared.secagg.limits import SMALLEST_COHORT
from medfl.shared.study import Name, Study

Share = Annotated[float, Field(ge=0, le=1)]
Slowness = Annotated[float, Field(gt=0, le=1000)]


class Scanner(Settings):
    """How a site's device changes every image. Intensities are taken from 0..1 of the image's own range and back."""

    gamma: float = Field(default=1.0, gt=0, le=10)
    bias_field: float = Field(default=0.0, ge=0, le=1)  # smooth field between 1-x and 1+x, multiplied
    noise: float = Field(default=0.0, ge=0, le=2)  # Gaussian, standard deviation in parts of the range
    resolution: float = Field(default=1.0, gt=0, le=1)  # sampled at so many times the points, then interpolated back
    invert: StrictBool = False
    colour: tuple[float, ...] = ()  # one factor for each channel


class Attacker(Settings):
    """What a dishonest site does: trains on reversed labels, or changes the update that it sends."""

    kind: Literal["label-flip", "sign-flip", "noise", "backdoor"]
    # Of the flipped or poisoned update; of the noise, its deviation in deviations of the update.
    scale: float = Field(default=1.0, gt=0, le=1e6)
    target: int = Field(default=0, ge=0, le=1000)  # backdoor: the class that images with the mark are taught to be
    share: Share = 0.5  # backdoor: of its training images that get the mark


def changes_update(attacker: Attacker) -> bool:
    """Whether it sends another update than its training gave."""
    return attacker.kind in ("sign-flip", "noise") or (attacker.kind == "backdoor" and attacker.scale != 1)


class PhantomSettings(Settings):
    """A hospital that does not exist: its DICOM files are drawn once, below the simulation's output folder."""

    scanner: int = Field(ge=0, le=100)  # the scanners of simulations/phantoms.py, again from the first after the last
    patients: int = Field(ge=5, le=10_000)
    seed: int = Field(default=0, ge=0, lt=2**31)
    split: SplitSettings = SplitSettings(validation=0.2, test=0.0, min_patients=5)


class VirtualSiteSettings(Settings):
    """One virtual hospital, and where its images lie or how they are drawn: exactly one of ``data``, ``phantom``."""

    name: Name
    data: DataSettings | None = None
    phantom: PhantomSettings | None = None
    scanner: Scanner = Scanner()
    attacker: Attacker | None = None
    slowness: Slowness = 1.0  # its training takes so many times as long as a usual site's
    joins: int = Field(default=1, ge=1)  # the first round it takes part in
    held_out: StrictBool = False  # it does not train: every model is scored on it as on a hospital that comes later

    @model_validator(mode="after")
    def _one_source(self) -> VirtualSiteSettings:
        if (self.data is None) == (self.phantom is None):
            raise ValueError("give exactly one of data and phantom")
        return self


class Partition(Settings):
    """Several virtual sites from one site's data, always by patient.

    ``labels``: shares of each class drawn from Dirichlet(alpha) (Hsu et al. 2019, https://arxiv.org/abs/1909.06335).
    ``quantity``: sizes drawn from Dirichlet(alpha). Small alpha means unequal sites.
    """

    sites: int = Field(ge=2, le=10_000)
    by: Literal["iid", "labels", "quantity"] = "iid"
    alpha: float = Field(default=0.5, gt=0, le=1e4)
    scanners: tuple[Scanner, ...] = ()  # dealt to the sites in turn
    attackers: int = Field(default=0, ge=0)  # the first so many sites
    attacker: Attacker = Attacker(kind="label-flip")
    stragglers: int = Field(default=0, ge=0)  # the last so many sites that train
    slowness: Slowness = 4.0  # of stragglers
    held_out: int = Field(default=0, ge=0)  # the last so many sites do not train

    @model_validator(mode="after")
    def _somebody_is_honest(self) -> Partition:
        if self.attackers + self.stragglers + self.held_out >= self.sites:
            raise ValueError("attackers, stragglers and held_out together must be fewer than sites")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """What its sites are called: ``site-1``, or ``site-001`` where they are hundreds."""
        width = len(str(self.sites))
        return tuple(f"site-{number:0{width}d}" for number in range(1, self.sites + 1))

    @property
    def training(self) -> tuple[str, ...]:
        """Names of those that train."""
        return self.names[: self.sites - self.held_out]


class Failures(Settings):
    """How often a site does not answer, drawn for each site and each time it is asked."""

    drop_out: Share = 0.0  # it does not train
    late: Share = 0.0  # it trains, and its answer comes after the deadline
    # Inside a secure sum, by phase: as often, the message never reaches the site, or its answer is lost.
    phases: dict[Phase, Share] = Field(default_factory=dict)
    # In training times of a usual site: who takes longer answers too late. Absent: rounds wait for the slowest.
    # Asynchronous strategies have none.
    deadline: Annotated[float, Field(ge=1, le=1e4)] | None = None

    @model_validator(mode="after")
    def _somebody_answers(self) -> Failures:
        if self.drop_out + self.late >= 1:
            raise ValueError("drop_out and late together must be below 1: no site would ever answer")
        for phase, share in self.phases.items():
            if share >= 1:
                raise ValueError(f"phases.{phase.value} must be below 1: no secure sum would ever come about")
        return self


class CuriousServer(Settings):
    """The coordinator tries to make a patient's picture from what it sees: :mod:`medfl.simulations.curious`."""

    site: Name | None = None  # whose image; absent: the first site that trains
    steps: int = Field(default=300, ge=1, le=100_000)  # of its search


class Baselines(Settings):
    """What stands beside the federation; pooled, alone, ensemble and cyclic have every site in every round."""

    fedavg: StrictBool = True  # the plain mean, where nothing that is compared is it
    alone: StrictBool = True  # each site by itself
    pooled: StrictBool = True  # all images in one place
    ensemble: StrictBool = True  # the mean prediction of all that were trained alone (needs alone)
    cyclic: StrictBool = False  # one model handed from site to site
    unprotected: StrictBool = True  # a private study once more without privacy; nothing where privacy is none
    trivial: StrictBool = True  # best threshold and mean mask, or the commonest class


class SimulationSettings(Settings):
    """A simulation file. ``variants`` are what ``--sweep`` runs: sections of the study, each with what it changes."""

    study: Study
    sites: tuple[VirtualSiteSettings, ...] = Field(min_length=1)
    partition: Partition | None = None
    failures: Failures = Failures()
    curious_server: CuriousServer | None = None
    variants: dict[Name, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    baselines: Baselines = Baselines()
    initial_weights: LocalPath | None = None  # the safetensors file whose SHA-256 the study names
    examples: StrictBool = True  # pictures of a held-out patient of each site in the report
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(default=(0,), min_length=1)
    output: LocalPath = Path("runs")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=1, ge=1, le=1024)
    workers: int = Field(default=1, ge=1, le=256)  # processes that sites are dealt to, each with one thread
    at_once: int = Field(default=1, ge=1, le=10_000)  # sites of equal shapes trained as one batched model; same to 1e-6
    engine: Literal["local", "ray"] = "local"  # ray: Flower's own runtime, for more machines than one
    ray_address: str | None = None  # of a Ray cluster, such as auto; absent: Ray is started on this machine

    @model_validator(mode="after")
    def _one_thread_a_worker(self) -> SimulationSettings:
        if self.workers > 1 and self.threads > 1:
            raise ValueError("workers have one thread each, so that their number changes no result: set threads to 1")
        if self.workers > 1 and self.at_once > 1:
            raise ValueError("workers train one site at a time each: use workers or at_once")
        if self.workers > 1 and self.device == "cuda":
            raise ValueError("on a GPU all sites share one process and one network: leave workers out")
        return self

    @model_validator(mode="after")
    def _fits_ray(self) -> SimulationSettings:
        if self.engine == "local":
            return self
        if self.workers > 1 or self.at_once > 1:
            raise ValueError("engine: ray deals sites to processes itself: leave workers and at_once out")
        slow = any(site.slowness != 1 or site.joins > 1 for site in self.sites)
        if slow or (self.partition is not None and self.partition.stragglers) or self.failures.deadline is not None:
            raise ValueError("engine: ray keeps no simulated clock: leave slowness, joins, stragglers and deadline out")
        for name, study in self.studies().items():
            if (why := unfit_for_ray(study)) is not None:
                raise ValueError(f"{name}: {why}")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> SimulationSettings:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError("sites must have names that differ from each other")
        if self.partition is not None:
            _refuse_beside_partition(self.sites)
        if self.curious_server is not None and (victim := self.curious_server.site) is not None:
            training = self.partition.training if self.partition else [s.name for s in self.sites if not s.held_out]
            if victim not in training:
                raise ValueError(
                    f"curious_server.site {victim}: no site of that name trains: name one that does, or none"
                )
        reserved = {"pooled", "alone", "ensemble", "cyclic", "unprotected", "trivial"}
        if not any(isinstance(study.strategy, FedAvgSettings) for study in self.studies().values()):
            reserved.add("fedavg")
        if taken := sorted(reserved & set(self.variants)):
            raise ValueError(f"variants: {taken[0]} is the name of a baseline: choose another")
        return self

    @model_validator(mode="after")
    def _seeds_are_used(self) -> SimulationSettings:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must differ from each other: the same seed gives the same run again")
        if self.study.seed not in (0, *self.seeds):
            raise ValueError(
                f"study.seed is {self.study.seed}, and a simulation runs with its seeds instead: leave study.seed out, "
                f"or write seeds: [{self.study.seed}]"
            )
        return self

    @model_validator(mode="after")
    def _rounds_can_succeed(self) -> SimulationSettings:
        paces = self._paces()
        for study in self._all_studies():
            needed, why = _quorum(study)
            if len(paces) < needed:
                raise ValueError(f"{why}, there are {len(paces)} sites that train from round 1")
            deadline = None if study.demands.asynchronous else self.failures.deadline
            if deadline is not None and (punctual := sum(slowness <= deadline for slowness in paces)) < needed:
                raise ValueError(
                    f"{why}, and {punctual} of the {len(paces)} sites that train from round 1 answer within "
                    f"failures.deadline, which is {deadline:g}: raise it, or lower slowness or minimum_sites"
                )
        return self

    @model_validator(mode="after")
    def _failures_can_be_simulated(self) -> SimulationSettings:
        for name, study in self.studies().items():
            self._refuse_hidden_attack(name, study)
        if self.failures.phases and all(s.secure_aggregation.mode == "none" for s in self.studies().values()):
            raise ValueError("failures.phases are those of a secure sum, and no study here has one: leave them out")
        return self

    def _paces(self) -> list[float]:
        """The slowness of each site that trains from round 1."""
        if (how := self.partition) is None:
            return [site.slowness for site in self.sites if not site.held_out and site.joins == 1]
        usual = len(how.training) - how.stragglers
        return [1.0] * usual + [how.slowness] * how.stragglers

    def _all_studies(self) -> list[Study]:
        """Every study that may be run among the sites: the file's own, its variants, and the plain mean beside them."""
        studies = [self.study, *self.studies().values()]
        if self.baselines.fedavg and not any(isinstance(study.strategy, FedAvgSettings) for study in studies):
            studies.append(self.study.model_copy(update={"strategy": FedAvgSettings()}))
        return studies

    def _refuse_hidden_attack(self, name: str, study: Study) -> None:
        attackers = [site.attacker for site in self.sites if site.attacker is not None]
        if self.partition is not None and self.partition.attackers:
            attackers.append(self.partition.attacker)
        if study.secure_aggregation.mode != "none" and any(changes_update(a) for a in attackers):
            raise ValueError(
                f"{name}: attackers that change their update are simulated without secure aggregation only: "
                "use kind label-flip, or backdoor without scale"
            )

    def studies(self) -> dict[str, Study]:
        """The study of every variant; without variants, the study itself under its strategy's name.

        Raises:
            ValueError: a variant is no study; names the variant and the first thing that is wrong.
        """
        if not self.variants:
            return {self.study.strategy.name: self.study}
        return {name: varied(self.study, name, changes) for name, changes in self.variants.items()}


_NOT_WITH_PARTITION = {
    "attacker": "use partition.attackers and attacker",
    "slowness": "use partition.stragglers and slowness",
    "held_out": "use partition.held_out",
    "joins": "list sites one by one where some join later",
}


def _refuse_beside_partition(sites: tuple[VirtualSiteSettings, ...]) -> None:
    """Raises ValueError where there are several, or the one says of itself what its parts cannot all be."""
    if len(sites) != 1:
        raise ValueError("partition divides the data of one site: list that one only")
    for field, instead in _NOT_WITH_PARTITION.items():
        if getattr(sites[0], field) != VirtualSiteSettings.model_fields[field].default:
            raise ValueError(
                f"partition makes other sites of {sites[0].name}, so that its {field} says nothing: {instead}"
            )


def _quorum(study: Study) -> tuple[int, str]:
    """How many answers a round of ``study`` takes, and what says so."""
    if study.secure_aggregation.mode != "none" and study.rounds.minimum_sites < SMALLEST_COHORT:
        return SMALLEST_COHORT, f"a secure sum takes {SMALLEST_COHORT} sites"
    return study.rounds.minimum_sites, f"study.rounds.minimum_sites is {study.rounds.minimum_sites}"


def unfit_for_ray(study: Study) -> str | None:
    """Why ``study`` cannot run on Ray and what can be done, or None where it can."""
    here = {
        "privacy": not isinstance(study.privacy, NoPrivacy),
        "secure_aggregation": study.secure_aggregation.mode != "none",
        "initial_weights": study.initial_weights is not None,
    }
    if what := [section for section, needed in here.items() if needed]:
        return f"engine: ray: {what[0]} needs what stays on this machine: use engine: local, with workers"
    return None


_KINDS = ("name", "mode")  # what tells the kinds of a section apart


_SECTIONS = ("strategy", "training", "model", "rounds", "privacy", "secure_aggregation")  # data are read once


def varied(study: Study, name: str, changes: Mapping[str, Mapping[str, Any]]) -> Study:
    """``study`` with some values of its sections replaced; a section of another kind is replaced whole."""
    content = study.model_dump(mode="json")
    for section, values in changes.items():
        before = content.get(section)
        if section not in _SECTIONS or not isinstance(before, dict):
            raise ValueError(f"variants: {name}: {section} cannot vary: use {', '.join(_SECTIONS)}")
        other_kind = any(kind in values and values[kind] != before.get(kind) for kind in _KINDS)
        content[section] = dict(values) if other_kind else {**before, **values}
        if section == "training" and {"epochs", "steps"} & set(values):
            content[section] = {key: v for key, v in content[section].items() if key not in {"epochs", "steps"}}
            content[section] |= {key: values[key] for key in ("epochs", "steps") if key in values}
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"variants: {name}: {where + ': ' if where else ''}{first['msg']}") from None
