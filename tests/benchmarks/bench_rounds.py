"""Deployed rounds over mutual TLS on loopback, three real sites: in clear and under secure aggregation.

    python tests/benchmarks/bench_rounds.py [--rounds 6]

A U-Net of about a million parameters, one optimizer step a round on tiny images: what is left is the federation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from medfl.shared.algorithms.travel import build_study_network, layouts
from medfl.shared.config import parse_settings
from medfl.shared.study import Study
from medfl.simulations.demo import Places, read_rows, run_folder, set_up, start_client, start_server, write_images
from medfl.simulations.processes import Processes

STUDY = """
name: bench
task: segmentation
data:
  modality: ct
  dimensions: 2
  classes: [background, lesion]
  label_map: {Lesion: lesion}
  preprocessing: {normalise: window, window: [-60, 200], size: [16, 16], fit: resize, slices: {per_case: 1}}
model: {name: unet, channels: [40, 80, 160, 320], residual_units: 0}
training: {loss: dice-ce, steps: 1, batch_size: 2}
rounds: {count: ROUNDS, minimum_sites: 3, deadline_s: 120, patience_s: 120, evaluate_every: ROUNDS}
privacy: {mode: none}
secure_aggregation: {mode: MODE}
"""


def round_seconds(mode: str, rounds: int, images: Path) -> tuple[int, list[float]]:
    """Parameters of the model, and the seconds of each round but the first and last (set-up, evaluation)."""
    study = parse_settings(STUDY.replace("MODE", mode).replace("ROUNDS", str(rounds)), Study, name="bench.yaml")
    with tempfile.TemporaryDirectory() as folder, Processes() as running:
        places = Places(Path(folder), names=("north", "south", "east"))
        for name in places.names:
            places.hospital(name).mkdir(parents=True)
            (places.hospital(name) / "dicom").symlink_to(images / "hospitals" / name / "dicom")
        set_up(places, study)
        server = start_server(places, running)
        for name in places.names:
            start_client(places, name, running)
        if server.wait(300) != 0:
            sys.exit((places.coordinator / "medfl-server.log").read_text())
        rows = read_rows(run_folder(places, study) / "metrics.jsonl")
    return layouts(study, build_study_network(study))[0].length, [row["seconds"] for row in rows[1:-1]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        write_images(Places(Path(folder), names=("north", "south", "east")), patients=8)
        parameters, clear = round_seconds("none", rounds, Path(folder))
        _, secure = round_seconds("msa1", rounds, Path(folder))
    print(f"{parameters:,} parameters, 3 sites, median of {len(clear)} rounds (min to max)")
    for name, seconds in (("in clear", clear), ("secure aggregation", secure)):
        print(f"{name:20}{statistics.median(seconds):6.2f} s   ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"{'difference':20}{statistics.median(secure) - statistics.median(clear):6.2f} s")


if __name__ == "__main__":
    main()
