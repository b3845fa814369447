"""A simulation from its file to its results: load, federate, compare, save."""

from __future__ import annotations

import csv
import hashlib
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import torch

from medfl.client.data.headers import Progress
from medfl.client.data.load import load_site_data
from medfl.client.data.secret import SiteKey
from medfl.client.data.tensors import SiteData
from medfl.server.checkpoint import save_model
from medfl.server.reporter import MetricsFile, Reporter, Several
from medfl.server.rounds import Ending
from medfl.shared.errors import DataError, TrainingError
from medfl.shared.files import write_whole
from medfl.shared.privacy.settings import NoPrivacy
from medfl.shared.study import Study
from medfl.simulations.baselines import alone, headline_or_nan, pooled, trivial, unprotected
from medfl.simulations.config import SimulationSettings
from medfl.simulations.federation import federate

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Row:
    """One method's score at one site for one seed."""

    method: str
    site: str
    seed: int
    score: float


@dataclass(frozen=True)
class Experiment:
    """All scores of a simulation, and where its files lie."""

    metric: str
    rows: tuple[Row, ...]
    folder: Path
    seconds: float
    patients: Mapping[str, int] = field(default_factory=dict)

    def mean(self, method: str, site: str) -> float:
        """Mean score over seeds."""
        return statistics.fmean(row.score for row in self.rows if row.method == method and row.site == site)

    @property
    def methods(self) -> list[str]:
        """All methods, in order of appearance."""
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def sites(self) -> list[str]:
        """All sites, in order of appearance."""
        return list(dict.fromkeys(row.site for row in self.rows))

    def to_dataframe(self) -> pd.DataFrame:
        """The rows as a table; needs pandas (``pip install medfl[report]``)."""
        import pandas as pd

        return pd.DataFrame([(r.method, r.site, r.seed, r.score) for r in self.rows], columns=list(_COLUMNS))


_COLUMNS = ("method", "site", "seed", "score")


def run_experiment(
    settings: SimulationSettings, *, reporter: Reporter | None = None, loading: Progress | None = None
) -> Experiment:
    """Run everything ``settings`` asks for and write ``results.csv``, ``results.json`` and, by seed, model and metrics.

    Raises:
        DataError: a site's data cannot be used. TrainingError, ConfigError: the study cannot be run.
    """
    started = time.monotonic()
    torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    rows: list[Row] = []
    patients: dict[str, int] = {}
    folder = settings.output / f"{settings.study.name}-{settings.study.digest[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in settings.seeds:
        study = settings.study.model_copy(update={"seed": seed})
        sites = load_sites(settings, study, device, loading)
        patients = {name: data.report.patients for name, data in sites.items()}
        scores = _methods(study, sites, settings, device, folder / f"seed-{seed}", reporter)
        rows += [
            Row(method, site, seed, value) for method, by_site in scores.items() for site, value in by_site.items()
        ]
    metric = "dice" if study.scoring.value == "dice" else "balanced accuracy"
    experiment = Experiment(metric, tuple(rows), folder, time.monotonic() - started, patients)
    _save(experiment, settings)
    return experiment


def load_sites(
    settings: SimulationSettings, study: Study, device: torch.device, loading: Progress | None = None
) -> dict[str, SiteData]:
    """Each virtual site's data, split by patient by a secret that the seed and the site's name give."""
    sites = {}
    for site in settings.sites:
        secret = hashlib.sha256(f"simulation/{study.seed}/{site.name}".encode()).digest()
        try:
            sites[site.name] = load_site_data(
                site.data,
                study.data,
                task=study.task.value,
                key=SiteKey(secret),
                device=device,
                progress=loading,
            )
        except DataError as error:
            raise DataError(f"site {site.name}: {error}") from None
    return sites


def choose_device(wish: str) -> torch.device:
    """``auto`` takes a CUDA device where there is one. Raises DataError where cuda is asked for and absent."""
    available = torch.cuda.is_available()
    if wish == "cuda" and not available:
        raise DataError("device: cuda was asked for, and PyTorch finds none: use device: auto or cpu")
    return torch.device("cuda" if wish != "cpu" and available else "cpu")


def _methods(
    study: Study,
    sites: Mapping[str, SiteData],
    settings: SimulationSettings,
    device: torch.device,
    folder: Path,
    reporter: Reporter | None,
) -> dict[str, dict[str, float]]:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "study.json", study.canonical(), mode=0o644)
    metrics = MetricsFile(folder / "metrics.jsonl")
    federation = federate(study, sites, device=device, reporter=Several(metrics, *([reporter] if reporter else [])))
    result = federation.result
    if result.ending is not Ending.DONE:
        raise TrainingError(
            f"study {study.name} ended after round {result.round} of {study.rounds.count}: {result.ending.value}: "
            "see the warnings before this line"
        )
    save_model(folder / "model.safetensors", study, result.layout, result.weights, round_number=result.round)
    scores: dict[str, dict[str, float]] = {}
    scores[study.strategy.name] = {name: headline_or_nan(federation.site_scores.get(name, {})) for name in sites}
    if not isinstance(study.privacy, NoPrivacy) and settings.baselines.unprotected:
        bare = unprotected(study)
        by_site = federate(bare, sites, device=device, reporter=reporter).site_scores
        scores["unprotected"] = {name: headline_or_nan(by_site.get(name, {})) for name in sites}
    if settings.baselines.pooled:
        scores["pooled"] = pooled(study, sites, device=device, reporter=reporter)
    if settings.baselines.alone:
        scores["alone"] = alone(study, sites, device=device, reporter=reporter)
    if settings.baselines.trivial:
        scores |= trivial(study, sites)
    return scores


def _save(experiment: Experiment, settings: SimulationSettings) -> None:
    with (experiment.folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows((row.method, row.site, row.seed, f"{row.score:.6f}") for row in experiment.rows)
    means = {m: {s: experiment.mean(m, s) for s in experiment.sites} for m in experiment.methods}
    summary = {
        "study": settings.study.digest,
        "metric": experiment.metric,
        "seeds": settings.seeds,
        "patients": dict(experiment.patients),
        "mean": means,
        "seconds": round(experiment.seconds, 1),
    }
    write_whole(experiment.folder / "results.json", json.dumps(summary, indent=2).encode(), mode=0o644)
