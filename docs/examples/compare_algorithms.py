"""Four algorithms on one data set dealt to eight sites with skewed labels, from Python: a table and a report.

    python docs/examples/compare_algorithms.py FOLDER

Draws its own pictures into FOLDER, so that it runs anywhere in under a minute.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from medfl.simulations import Experiment, load_simulation, run_experiment

SIMULATION = {
    "study": {
        "name": "example",
        "task": "classification",
        "data": {
            "modality": "photo",
            "dimensions": 2,
            "classes": ["plain", "bright"],
            "preprocessing": {"normalise": "zscore", "size": [8, 8]},
        },
        "model": {"name": "logistic", "inputs": 64},
        "training": {
            "loss": "cross-entropy",
            "optimizer": "sgd",
            "learning_rate": 0.05,
            "batch_size": 8,
            "steps": 10,
        },
        "rounds": {"count": 10, "minimum_sites": 4},
        "privacy": {"mode": "none"},
        "secure_aggregation": {"mode": "none"},
    },
    "sites": [{"name": "all", "data": {"source": "table", "file": "sites.csv"}}],
    "partition": {"sites": 8, "by": "labels", "alpha": 0.3, "scanners": [{}, {"gamma": 1.5, "noise": 0.1}]},
    "failures": {"drop_out": 0.1},
    "variants": {
        "fedavg": {},
        "fedprox": {"strategy": {"name": "fedprox", "mu": 0.1}},
        "scaffold": {"strategy": {"name": "scaffold"}},
        "ditto": {"strategy": {"name": "ditto"}},
    },
    "seeds": [0, 1, 2],
    "output": "runs",
}


def draw_pictures(folder: Path, patients: int = 240) -> None:
    """Noise, and in every second picture a bright corner; listed in ``sites.csv``."""
    rng = np.random.default_rng(0)
    with (folder / "sites.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["patient", "image", "label"])
        for number in range(patients):
            pixels = rng.normal(110, 40, (8, 8))
            pixels[:3, :3] += 45 * (number % 2)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
            table.writerow([f"P{number:03d}", f"{number}.png", number % 2])


def main(folder: Path) -> Experiment:
    """Draw, run, compare."""
    from medfl.simulations.report import write_report

    folder.mkdir(parents=True, exist_ok=True)
    draw_pictures(folder)
    path = folder / "simulation.yaml"
    path.write_text(yaml.safe_dump(SIMULATION), "utf-8")
    settings = load_simulation(path)
    experiment = run_experiment(settings, sweep=True)  # a second call takes everything from the folder
    scores = experiment.to_dataframe()
    print(scores.groupby("method")["score"].agg(["mean", "min", "max"]).round(3))
    against = experiment.compare("scaffold", "fedavg")
    print(f"scaffold against fedavg: {against.difference:+.3f}, p {against.p:.2g} from {against.pairs} pairs")
    print(write_report(experiment, settings))
    return experiment


if __name__ == "__main__":
    main(Path(sys.argv[1]))
