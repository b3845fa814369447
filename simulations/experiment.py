"""A simulation from its file to its results: load, federate, compare, save; a sweep goes on where it stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import torch

from medfl.client.data.headers import Progress
from medfl.server.reporter import Reporter
from medfl.shared.errors import DataError, TrainingError
from medfl.shared.initial_weights import read_initial, shelve
from medfl.shared.logs import quiet_libraries
from medfl.shared.study import Study
from medfl.simulations.cast import held_out_of
from medfl.simulations.config import SimulationSettings
from medfl.simulations.folders import folder_of
from medfl.simulations.one_seed import Counts, OneSeed
from medfl.simulations.results import Cell, Experiment, Row
from medfl.simulations.sites import load_sites

__all__ = ["Cell", "Experiment", "Row", "SweepFailed", "choose_device", "load_sites", "run_experiment"]

log = logging.getLogger("medfl.simulations")


class SweepFailed(TrainingError):
    """Some methods of a sweep did not come to their end. ``experiment`` is saved, without scores (NaN) of these."""

    def __init__(self, failed: Sequence[str], experiment: Experiment) -> None:
        again = "the same command tries those that failed again when their settings are others"
        super().__init__("\n".join([*failed, f"all else is in {experiment.folder}; {again}"]))
        self.experiment = experiment


def run_experiment(
    settings: SimulationSettings,
    *,
    sweep: bool = False,
    reporter: Reporter | None = None,
    loading: Progress | None = None,
) -> Experiment:
    """Run all that ``settings`` asks for and write ``results.csv``, ``results.json`` and, by seed, models and metrics.

    ``sweep`` runs every variant instead of the study itself, and takes what an earlier run of the same settings has
    already done from the output folder. There a method whose training fails does not keep the others from running.

    Raises:
        DataError: a site's data cannot be used. TrainingError, ConfigError: the study cannot be run.
        SweepFailed: methods of a sweep failed; the others are done and saved.
    """
    started = time.monotonic()
    quiet_libraries()
    torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    folder = folder_of(settings)
    folder.mkdir(parents=True, exist_ok=True)
    if settings.initial_weights is not None:
        shelve(read_initial(settings.initial_weights))
    cells: list[Cell] = []
    counts: Counts | None = None  # of the first seed
    failed: list[str] = []
    earlier = 0.0  # seconds that earlier runs took for what is done
    for seed in settings.seeds:
        work = OneSeed(settings, seed, device, folder / f"seed-{seed}", reporter, loading, resume=sweep)
        cells += work.run(sweep=sweep)
        counts = counts or work.counts
        earlier += work.earlier
        failed += [f"{name}, seed {seed}: {why}" for name, why in work.failed.items()]
    assert counts is not None  # noqa: S101 - settings have a seed
    experiment = Experiment(
        _metric(settings.study),
        _in_order(cells),
        folder,
        earlier + time.monotonic() - started,
        counts.all,
        held_out_of(settings, list(counts.all)),
        counts.scored,
        counts.left_out,
    )
    experiment.save(study=settings.study.digest)
    if failed:
        raise SweepFailed(failed, experiment)
    return experiment


def choose_device(wish: str) -> torch.device:
    """``auto`` takes a CUDA device where there is one. Raises DataError where cuda is asked for and absent."""
    available = torch.cuda.is_available()
    if wish == "cuda" and not available:
        raise DataError("device: cuda was asked for, and PyTorch finds none: use device: auto or cpu")
    return torch.device("cuda" if wish != "cpu" and available else "cpu")


def _metric(study: Study) -> str:
    return "dice" if study.scoring.value == "dice" else "balanced accuracy"


def _in_order(cells: list[Cell]) -> tuple[Cell, ...]:
    """All seeds of a method together, methods in the order in which they were run."""
    order: Mapping[str, int] = {name: n for n, name in enumerate(dict.fromkeys(cell.method for cell in cells))}
    return tuple(sorted(cells, key=lambda cell: (order[cell.method], cell.seed)))
