"""Everything that a simulation runs for one seed: federated methods, and what they have to beat."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import torch

from medfl.client.data.headers import Progress
from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.client.releases import told
from medfl.client.workbench import make_bench
from medfl.server.checkpoint import save_model
from medfl.server.reporter import MetricsFile, Reporter, Several
from medfl.shared.algorithms.settings import FedAvgSettings
from medfl.shared.errors import TrainingError
from medfl.shared.files import write_whole
from medfl.shared.metrics import headline
from medfl.shared.privacy.settings import ClientLevel, NoPrivacy
from medfl.shared.study import Study
from medfl.simulations import examples
from medfl.simulations.baselines import (
    Trained,
    alone_and_ensemble,
    cyclic,
    initial_model,
    pooled,
    score,
    score_at_the_end,
    trivial,
    unprotected,
)
from medfl.simulations.cast import attackers_of, held_out_of, rhythms_of
from medfl.simulations.config import SimulationSettings
from medfl.simulations.curious import reconstruct
from medfl.simulations.federation import Federation, federate, permissive_policy
from medfl.simulations.folders import circumstances, claim
from medfl.simulations.misbehaviour import backdoor_success
from medfl.simulations.results import Cell
from medfl.simulations.sites import left_out_of, load_sites, patients_of

log = logging.getLogger("medfl.simulations")

Work = Callable[[Study], list[Cell]]
"""Runs one method, or several that share their training."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Of a seed's data: patients by site, all and those scores rest on; what is left out by site and reason."""

    all: dict[str, int]
    scored: dict[str, int]
    left_out: dict[str, dict[str, int]]


@dataclass
class OneSeed:
    """Everything that is run for one seed. Data are read when something has to be run, and once."""

    settings: SimulationSettings
    seed: int
    device: torch.device
    folder: Path
    reporter: Reporter | None
    loading: Progress | None
    resume: bool
    earlier: float = 0.0  # seconds that the cells took which were taken from an earlier run
    failed: dict[str, str] = field(default_factory=dict)  # method -> why
    _data: dict[str, SiteData] | None = None
    _counts: Counts | None = None
    _truth: str | None = None  # the digest of the pictures that are shown

    def run(self, *, sweep: bool) -> list[Cell]:
        """Federated methods, then what they have to beat."""
        self.folder.mkdir(parents=True, exist_ok=True)
        cells, jobs = [], self._jobs(sweep=sweep)
        for number, (name, (study, work)) in enumerate(jobs.items(), 1):
            log.info("seed %d, method %d of %d: %s", self.seed, number, len(jobs), name)
            cells += self._cells(name, study, work)
        return cells

    def _jobs(self, *, sweep: bool) -> dict[str, tuple[Study, Work]]:
        """What is to be run, by name, in its order."""
        base, asked = self._seeded(self.settings.study), self.settings.baselines
        studies = self.settings.studies() if sweep else {base.strategy.name: base}
        jobs: dict[str, tuple[Study, Work]] = {
            name: (self._seeded(study), _Federated(self, name, self.folder / name if sweep else self.folder))
            for name, study in studies.items()
        }
        if asked.fedavg and not any(isinstance(study.strategy, FedAvgSettings) for study in studies.values()):
            jobs["fedavg"] = (base.model_copy(update={"strategy": FedAvgSettings()}), _Federated(self, "fedavg", None))
        if not sweep and not isinstance(base.privacy, NoPrivacy) and asked.unprotected:
            jobs["unprotected"] = (unprotected(base), _Federated(self, "unprotected", None))
        if isinstance(base.privacy, ClientLevel) and (asked.pooled or asked.alone):
            log.info("pooled, alone and ensemble are without privacy: the noise of client-level privacy is on a sum")
        baselines = {"pooled": self._pooled, "alone": self._alone, "cyclic": self._cyclic, "trivial": self._trivial}
        return jobs | {name: (base, work) for name, work in baselines.items() if getattr(asked, name)}

    @property
    def training(self) -> dict[str, SiteData]:
        """The data of the sites that train."""
        away = held_out_of(self.settings, list(self.sites))
        return {name: data for name, data in self.sites.items() if name not in away}

    @property
    def elsewhere(self) -> dict[str, SiteData]:
        """The data of the sites that do not."""
        return {name: self.sites[name] for name in held_out_of(self.settings, list(self.sites))}

    @property
    def sites(self) -> dict[str, SiteData]:
        """All sites' data."""
        if self._data is None:
            self._data = load_sites(self.settings, self._seeded(self.settings.study), self.device, self.loading)
            self._counts = Counts(
                {name: patients_of(data) for name, data in self._data.items()},
                {name: patients_of(data, Split.VALIDATION) for name, data in self._data.items()},
                left_out_of(self.settings, self._data),
            )
            write_whole(self.folder / "patients.json", json.dumps(asdict(self._counts)).encode(), mode=0o644)
            claim(self.folder.parent, self.settings)
        return self._data

    @property
    def counts(self) -> Counts:
        """What is counted of the data; read again where this run had no need of them."""
        if self._counts is None:
            with suppress(OSError, ValueError, TypeError):
                self._counts = Counts(**json.loads((self.folder / "patients.json").read_bytes()))
        if self._counts is None:
            _ = self.sites  # which counts
        assert self._counts is not None  # noqa: S101 - it is counted by now
        return self._counts

    def _seeded(self, study: Study) -> Study:
        return study.model_copy(update={"seed": self.seed})

    def _cells(self, name: str, study: Study, work: Work) -> list[Cell]:
        """What ``work`` gives; in a sweep from the folder where an earlier run of the same settings has left it.

        In a sweep a method whose training fails has no scores, and is not tried again with the same settings.
        """
        digest, index = self._digest(name, study), self.folder / "cells" / f"{name}.json"
        if self.resume and (kept := self._kept(name, index, digest)) is not None:
            return kept
        started = time.monotonic()
        try:
            cells = work(study)
        except TrainingError as error:
            if not self.resume:
                raise TrainingError(f"{name}, seed {self.seed}: {error}") from None
            log.warning("%s, seed %d: %s", name, self.seed, error)
            self.failed[name] = str(error)
            own = isinstance(work, _Federated) and work.folder is not None
            cells = [Cell(name, self.seed, dict.fromkeys(self.sites, math.nan), "federated" if own else "baseline")]
        for cell in cells:
            cell.save(self.folder / "cells" / f"{name}.{cell.method}.json", digest)
        content = {"digest": digest, "methods": [cell.method for cell in cells], "seconds": time.monotonic() - started}
        content |= {"failed": self.failed[name]} if name in self.failed else {}
        write_whole(index, json.dumps(content).encode(), mode=0o644)
        return cells

    def _kept(self, name: str, index: Path, digest: str) -> list[Cell] | None:
        try:
            content = json.loads(index.read_bytes())
            methods = content["methods"] if content["digest"] == digest else None
            seconds, why = float(content["seconds"]), str(content.get("failed", ""))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if methods is None:
            return None
        cells = [Cell.load(index.with_name(f"{index.stem}.{method}.json"), digest) for method in methods]
        if None in cells:
            return None
        self.earlier += seconds
        self.failed |= {name: why} if why else {}
        return [cell for cell in cells if cell is not None]

    def _digest(self, name: str, study: Study) -> str:
        """Names all that can change a cell's numbers, except the images themselves."""
        parts = [importlib.metadata.version("medfl"), name, study.digest, circumstances(self.settings)]
        if name == "alone":  # the ensemble is made beside it
            parts.append(f"ensemble {self.settings.baselines.ensemble}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _pooled(self, study: Study) -> list[Cell]:
        found = pooled(study, self.training, self.elsewhere, device=self.device, reporter=self.reporter)
        return self._baseline("pooled", found)

    def _alone(self, study: Study) -> list[Cell]:
        one, all_ = alone_and_ensemble(study, self.training, self.elsewhere, device=self.device, reporter=self.reporter)
        return self._baseline("alone", one) + (
            [Cell("ensemble", self.seed, all_.scores, "baseline")] if self.settings.baselines.ensemble else []
        )

    def _cyclic(self, study: Study) -> list[Cell]:
        method = "cyclic" if isinstance(study.privacy, NoPrivacy) else "cyclic without privacy"
        return self._baseline(method, cyclic(study, self.training, self.elsewhere, device=self.device))

    def _baseline(self, method: str, found: Trained) -> list[Cell]:
        self.show(method, found.study, {name: (model, None) for name, model in found.models.items()})
        return [Cell(method, self.seed, found.scores, "baseline")]

    def _trivial(self, study: Study) -> list[Cell]:
        found = trivial(study, self.training, self.elsewhere)
        if study.initial_weights is not None:
            found["before training"] = score(study, initial_model(study, self.device), self.sites, device=self.device)
        return [Cell(method, self.seed, scores, "trivial") for method, scores in found.items()]

    def show(self, method: str, study: Study, models: examples.Models) -> None:
        """Keep what ``method`` says of an image of each site, for the report; of the first seed only."""
        path = self.folder / "examples" / f"{method}.npz"
        path.unlink(missing_ok=True)  # of an earlier model
        if not self.settings.examples or self.seed != self.settings.seeds[0]:
            return
        if self._truth is None:
            self._truth = examples.save_truth(path.with_name("truth.npz"), study, self.sites)
        examples.save(path, examples.predict(study, models, self.sites, self.device), self._truth)


@dataclass(frozen=True)
class _Federated:
    """Runs one federated method; its model and metrics go to ``folder``, where there is one."""

    seed: OneSeed
    name: str
    folder: Path | None

    def __call__(self, study: Study) -> list[Cell]:
        """Raises TrainingError when the study does not come to its end."""
        work, started = self.seed, time.monotonic()
        listeners = [work.reporter] if work.reporter else []
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / "study.json", study.canonical(), mode=0o644)
            listeners.insert(0, MetricsFile(self.folder / "metrics.jsonl"))
        federation = self._federate(study, Several(*listeners))
        result = federation.result
        if not federation.complete:
            raise TrainingError(
                f"study {study.name} ended after round {result.round} of {study.rounds.count}: {result.ending.value}: "
                "see the warnings before this line"
            )
        if self.folder is not None:
            save_model(
                self.folder / "model.safetensors", study, result.layout, result.weights, round_number=result.of_round
            )
        scores = score_at_the_end(study, federation, work.training, device=work.device)
        scores |= score(study, result.weights, work.elsewhere, device=work.device)
        models = {name: (result.weights, federation.kept.get(name)) for name in work.sites}
        work.show(self.name, study, models)
        curve = [(r.round, found[1]) for r in federation.rounds if (found := headline(r.scores)) is not None]
        cell = Cell(
            self.name,
            work.seed,
            scores,
            curve=curve,
            received_bytes=sum(r.received_bytes for r in federation.rounds),
            seconds=round(time.monotonic() - started, 3),
            epsilon=getattr(study.privacy, "epsilon", None),
            spent={
                name: [row["epsilon"] for row in rows if "epsilon" in row]
                for name, rows in federation.site_rows.items()
                if any("epsilon" in row for row in rows)
            },
            leaves="" if isinstance(study.privacy, NoPrivacy) else told(study, permissive_policy(study)),
            times=federation.times,
            reconstruction=self._reconstruction(study, federation),
            backdoor=self._backdoor(study, federation),
        )
        return [cell if self.folder is not None else replace(cell, kind="baseline")]

    def _federate(self, study: Study, reporter: Reporter) -> Federation:
        """On the engine that the settings name."""
        work = self.seed
        attackers = attackers_of(work.settings, list(work.sites))
        if work.settings.engine == "ray":
            from medfl.simulations.ray_engine import federate_on_ray  # imports Ray, where it is installed

            return federate_on_ray(
                study,
                work.training,
                reporter=reporter,
                failures=work.settings.failures,
                attackers=attackers,
                address=work.settings.ray_address,
                gpus_per_site=1.0 if work.device.type == "cuda" else 0.0,
            )
        return federate(
            study,
            work.training,
            device=work.device,
            reporter=reporter,
            failures=None if work.settings.failures == type(work.settings.failures)() else work.settings.failures,
            attackers=attackers,
            rhythms=rhythms_of(work.settings, list(work.sites)),
            workers=1 if work.device.type == "cuda" else work.settings.workers,
            at_once=work.settings.at_once,
        )

    def _reconstruction(self, study: Study, federation: Federation) -> tuple[float, float] | None:
        """What a curious coordinator makes of a patient; None where the file asks for none."""
        work = self.seed
        if (how := work.settings.curious_server) is None:
            return None
        rows = [row for rows in federation.site_rows.values() for row in rows if "noise_multiplier" in row]
        noise = min((float(row["noise_multiplier"]) for row in rows), default=None)
        found = reconstruct(study, work.training, how, device=work.device, noise_multiplier=noise)
        return found.found, found.grey

    def _backdoor(self, study: Study, federation: Federation) -> float | None:
        """How often the attackers' mark works at honest sites; None where nobody planted one."""
        work, cheats = self.seed, attackers_of(self.seed.settings, list(self.seed.sites))
        planted = [attacker for attacker in cheats.values() if attacker.kind == "backdoor"]
        if not planted:
            return None
        bench, found = make_bench(study, work.device), []
        for name, data in work.sites.items():
            if name not in cheats:
                bench.load_for_patients(study, federation.result.weights, federation.kept.get(name))
                found.append(backdoor_success(bench.network, data.splits[Split.VALIDATION], planted[0].target))
        known = [share for share in found if not math.isnan(share)]
        return sum(known) / len(known) if known else None
