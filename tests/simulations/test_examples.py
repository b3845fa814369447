"""What models make of one held-out image of each site, and that it is told of the very image that is shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from small_simulation import simulation
from tiny import masks_study, site_data

from medfl.simulations import load_simulation, run_experiment
from medfl.simulations.baselines import initial_model
from medfl.simulations.examples import load, predict, save, save_truth

CPU = torch.device("cpu")


def test_what_was_said_of_other_pictures_is_left_out(tmp_path: Path) -> None:
    study = masks_study()
    model = {"a": (initial_model(study, CPU), None)}
    before, after = {"a": site_data(study, seed=0)}, {"a": site_data(study, seed=1)}
    digest = save_truth(tmp_path / "truth.npz", study, before)
    for method in ("fedavg", "pooled"):
        save(tmp_path / f"{method}.npz", predict(study, model, before, CPU), digest)
    assert set(load(tmp_path, ["fedavg", "pooled", "alone"])["a"].predicted) == {"fedavg", "pooled"}

    other = save_truth(tmp_path / "truth.npz", study, after)
    save(tmp_path / "fedavg.npz", predict(study, model, after, CPU), other)
    found = load(tmp_path, ["fedavg", "pooled", "alone"])["a"]
    assert set(found.predicted) == {"fedavg"}
    assert np.array_equal(found.predicted["fedavg"], predict(study, model, after, CPU)["a"])


def test_a_run_whose_images_are_others_shows_these(tmp_path: Path) -> None:
    few = {"alone": False, "pooled": False, "trivial": False}
    images = []
    for scanners in ([], [{"invert": True}]):
        partition = {"sites": 4, "scanners": scanners}
        path = simulation(tmp_path, seeds=[0], variants={}, baselines=few, partition=partition)
        experiment = run_experiment(load_simulation(path))
        example = load(experiment.folder / "seed-0" / "examples", experiment.methods)["site-1"]
        assert set(example.predicted) == {"fedavg"}
        images.append(example.image.astype(int))
    assert np.abs(images[0] + images[1] - 255).max() <= 2, "upside down"


def test_a_run_without_pictures_leaves_none_of_an_earlier_model(tmp_path: Path) -> None:
    few = {"alone": False, "pooled": False, "trivial": False}
    for examples in (True, False):
        path = simulation(tmp_path, seeds=[0], variants={}, baselines=few, examples=examples)
        experiment = run_experiment(load_simulation(path))
        found = load(experiment.folder / "seed-0" / "examples", experiment.methods)
        assert all(bool(example.predicted) == examples for example in found.values())
