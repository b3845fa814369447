"""A simulation from its file to its results: load, federate, compare, save; a sweep goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import torch

from medfl.client.data.headers import Progress
from medfl.client.data.load import load_site_data
from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import DicomSettings
from medfl.client.data.tensors import SiteData
from medfl.server.checkpoint import save_model
from medfl.server.reporter import MetricsFile, Reporter, Several
from medfl.server.rounds import Ending
from medfl.shared.errors import DataError, TrainingError
from medfl.shared.files import write_whole
from medfl.shared.metrics import headline
from medfl.shared.privacy.settings import NoPrivacy
from medfl.shared.study import Study
from medfl.simulations.baselines import alone_and_ensemble, cyclic, headline_or_nan, pooled, trivial, unprotected
from medfl.simulations.config import Attacker, SimulationSettings, VirtualSiteSettings
from medfl.simulations.federation import federate
from medfl.simulations.heterogeneity import as_scanned
from medfl.simulations.misbehaviour import with_flipped_labels
from medfl.simulations.partition import partition
from medfl.simulations.phantoms import write_hospital
from medfl.simulations.results import Cell, Experiment, Row

__all__ = ["Cell", "Experiment", "Row", "choose_device", "load_sites", "run_experiment"]


def run_experiment(
    settings: SimulationSettings,
    *,
    sweep: bool = False,
    reporter: Reporter | None = None,
    loading: Progress | None = None,
) -> Experiment:
    """Run all that ``settings`` asks for and write ``results.csv``, ``results.json`` and, by seed, models and metrics.

    ``sweep`` runs every variant instead of the study itself, and takes what an earlier run of the same settings has
    already done from the output folder.

    Raises:
        DataError: a site's data cannot be used. TrainingError, ConfigError: the study cannot be run.
    """
    started = time.monotonic()
    torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    folder = settings.output / f"{settings.study.name}-{settings.study.digest[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    cells: list[Cell] = []
    patients: dict[str, int] = {}
    for seed in settings.seeds:
        work = _Seed(settings, seed, device, folder / f"seed-{seed}", reporter, loading, resume=sweep)
        cells += work.run(sweep=sweep)
        patients = patients or work.patients()
    experiment = Experiment(_metric(settings.study), _in_order(cells), folder, time.monotonic() - started, patients)
    experiment.save(study=settings.study.digest)
    return experiment


def load_sites(
    settings: SimulationSettings, study: Study, device: torch.device, loading: Progress | None = None
) -> dict[str, SiteData]:
    """Each virtual site's data as its scanner gives them, split by patient by a secret of the seed and its name."""
    sites = {}
    for site in settings.sites:
        secret = hashlib.sha256(f"simulation/{study.seed}/{site.name}".encode()).digest()
        try:
            data = load_site_data(
                site.data or drawn(site, settings.output / "phantoms"),
                study.data,
                task=study.task.value,
                key=SiteKey(secret),
                device=device,
                progress=loading,
            )
        except DataError as error:
            raise DataError(f"site {site.name}: {error}") from None
        sites[site.name] = as_scanned(data, site.scanner, seed=_number(secret))
    if (how := settings.partition) is not None:
        (whole,) = sites.values()
        sites = partition(whole, how, seed=study.seed)
        if how.scanners:
            sites = {
                name: as_scanned(data, how.scanners[number % len(how.scanners)], seed=study.seed * 10_007 + number)
                for number, (name, data) in enumerate(sites.items())
            }
    flipping = {name for name, attacker in attackers_of(settings, list(sites)).items() if attacker.kind == "label-flip"}
    classes = len(study.data.classes)
    return {name: with_flipped_labels(data, classes) if name in flipping else data for name, data in sites.items()}


def drawn(site: VirtualSiteSettings, folder: Path) -> DicomSettings:
    """The site's phantom patients as DICOM files below ``folder``, drawn unless an earlier run has."""
    phantom = site.phantom
    assert phantom is not None  # noqa: S101 - the settings allow nothing else
    target = folder / f"scanner-{phantom.scanner}-patients-{phantom.patients}-seed-{phantom.seed}"
    if not target.exists():
        unfinished = target.with_name(target.name + ".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_hospital(unfinished, phantom.scanner, phantom.patients, phantom.seed)
        unfinished.rename(target)
    return DicomSettings(source="dicom", folder=target, split=phantom.split)


def attackers_of(settings: SimulationSettings, names: list[str]) -> dict[str, Attacker]:
    """Which sites cheat, and how."""
    if settings.partition is not None:
        return dict.fromkeys(names[: settings.partition.attackers], settings.partition.attacker)
    return {site.name: site.attacker for site in settings.sites if site.attacker is not None}


def choose_device(wish: str) -> torch.device:
    """``auto`` takes a CUDA device where there is one. Raises DataError where cuda is asked for and absent."""
    available = torch.cuda.is_available()
    if wish == "cuda" and not available:
        raise DataError("device: cuda was asked for, and PyTorch finds none: use device: auto or cpu")
    return torch.device("cuda" if wish != "cpu" and available else "cpu")


@dataclass
class _Seed:
    """Everything that is run for one seed. Data are read when something has to be run, and once."""

    settings: SimulationSettings
    seed: int
    device: torch.device
    folder: Path
    reporter: Reporter | None
    loading: Progress | None
    resume: bool
    _data: dict[str, SiteData] | None = None
    _patients: dict[str, int] | None = None

    def run(self, *, sweep: bool) -> list[Cell]:
        """Federated methods, then what they have to beat."""
        self.folder.mkdir(parents=True, exist_ok=True)
        base = self._seeded(self.settings.study)
        studies = self.settings.studies() if sweep else {base.strategy.name: base}
        cells = []
        for name, study in studies.items():
            place = self.folder / name if sweep else self.folder
            cells += self._cells(name, self._seeded(study), _Federated(self, name, place))
        asked = self.settings.baselines
        if not sweep and not isinstance(base.privacy, NoPrivacy) and asked.unprotected:
            cells += self._cells("unprotected", unprotected(base), _Federated(self, "unprotected", None))
        if asked.pooled:
            cells += self._cells("pooled", base, self._pooled)
        if asked.alone:
            cells += self._cells("alone", base, self._alone)
        if asked.cyclic:
            cells += self._cells("cyclic", base, self._cyclic)
        if asked.trivial:
            cells += self._cells("trivial", base, self._trivial)
        return cells

    @property
    def sites(self) -> dict[str, SiteData]:
        """The sites' data."""
        if self._data is None:
            self._data = load_sites(self.settings, self._seeded(self.settings.study), self.device, self.loading)
            self._patients = {name: patients_of(data) for name, data in self._data.items()}
            write_whole(self.folder / "patients.json", json.dumps(self._patients).encode(), mode=0o644)
        return self._data

    def patients(self) -> dict[str, int]:
        """Patients by site, read again where this run had no need of the data."""
        if self._patients is None:
            try:
                self._patients = {
                    str(k): int(v) for k, v in json.loads((self.folder / "patients.json").read_bytes()).items()
                }
            except (OSError, ValueError):
                self._patients = {name: patients_of(data) for name, data in self.sites.items()}
        return self._patients

    def _seeded(self, study: Study) -> Study:
        return study.model_copy(update={"seed": self.seed})

    def _cells(self, name: str, study: Study, work: Callable[[Study], list[Cell]]) -> list[Cell]:
        """What ``work`` gives; from the folder where an earlier run of the same settings has left it."""
        digest, index = self._digest(name, study), self.folder / "cells" / f"{name}.json"
        if self.resume and (kept := self._kept(index, digest)) is not None:
            return kept
        cells = work(study)
        for cell in cells:
            cell.save(self.folder / "cells" / f"{name}.{cell.method}.json", digest)
        write_whole(
            index, json.dumps({"digest": digest, "methods": [cell.method for cell in cells]}).encode(), mode=0o644
        )
        return cells

    def _kept(self, index: Path, digest: str) -> list[Cell] | None:
        try:
            content = json.loads(index.read_bytes())
            methods = content["methods"] if content["digest"] == digest else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if methods is None:
            return None
        cells = [Cell.load(index.with_name(f"{index.stem}.{method}.json"), digest) for method in methods]
        return None if None in cells else [cell for cell in cells if cell is not None]

    def _digest(self, name: str, study: Study) -> str:
        """Names all that can change a cell's numbers, except the images themselves."""
        settings = self.settings
        parts = [name, study.digest, settings.failures.model_dump_json()]
        parts += [settings.partition.model_dump_json() if settings.partition else ""]
        parts += [site.model_dump_json() for site in settings.sites]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _pooled(self, study: Study) -> list[Cell]:
        scores = pooled(study, self.sites, device=self.device, reporter=self.reporter)
        return [Cell("pooled", self.seed, scores, "baseline")]

    def _alone(self, study: Study) -> list[Cell]:
        scores, ensemble = alone_and_ensemble(study, self.sites, device=self.device, reporter=self.reporter)
        cells = [Cell("alone", self.seed, scores, "baseline")]
        if self.settings.baselines.ensemble:
            cells.append(Cell("ensemble", self.seed, ensemble, "baseline"))
        return cells

    def _cyclic(self, study: Study) -> list[Cell]:
        return [Cell("cyclic", self.seed, cyclic(study, self.sites, device=self.device), "baseline")]

    def _trivial(self, study: Study) -> list[Cell]:
        return [Cell(method, self.seed, scores, "trivial") for method, scores in trivial(study, self.sites).items()]


@dataclass(frozen=True)
class _Federated:
    """Runs one federated method; its model and metrics go to ``folder``, where there is one."""

    seed: _Seed
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
        federation = federate(
            study,
            work.sites,
            device=work.device,
            reporter=Several(*listeners),
            failures=None if work.settings.failures == type(work.settings.failures)() else work.settings.failures,
            attackers=attackers_of(work.settings, list(work.sites)),
        )
        result = federation.result
        if result.ending not in (Ending.DONE, Ending.CONVERGED):
            raise TrainingError(
                f"study {study.name} ended after round {result.round} of {study.rounds.count}: {result.ending.value}: "
                "see the warnings before this line"
            )
        if self.folder is not None:
            save_model(
                self.folder / "model.safetensors", study, result.layout, result.weights, round_number=result.round
            )
        curve = [(r.round, found[1]) for r in federation.rounds if (found := headline(r.scores)) is not None]
        cell = Cell(
            self.name,
            work.seed,
            {name: headline_or_nan(federation.site_scores.get(name, {})) for name in work.sites},
            curve=curve,
            received_bytes=sum(r.received_bytes for r in federation.rounds),
            seconds=round(time.monotonic() - started, 3),
            epsilon=getattr(study.privacy, "epsilon", None),
            spent={
                name: [row["epsilon"] for row in rows if "epsilon" in row]
                for name, rows in federation.site_rows.items()
                if any("epsilon" in row for row in rows)
            },
        )
        return [cell if self.folder is not None else replace(cell, kind="baseline")]


def patients_of(data: SiteData) -> int:
    """Patients of all splits together."""
    return sum(int(torch.unique(part.patients).numel()) for part in data.splits.values())


def _metric(study: Study) -> str:
    return "dice" if study.scoring.value == "dice" else "balanced accuracy"


def _number(secret: bytes) -> int:
    return int.from_bytes(secret[:6], "big")


def _in_order(cells: list[Cell]) -> tuple[Cell, ...]:
    """All seeds of a method together, methods in the order in which they were run."""
    order: Mapping[str, int] = {name: n for n, name in enumerate(dict.fromkeys(cell.method for cell in cells))}
    return tuple(sorted(cells, key=lambda cell: (order[cell.method], cell.seed)))
