"""The laboratory's roles: sites that are held out, poisoned, slow; what is measured of each; one site only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from rich.console import Console
from small_simulation import simulation
from tiny import classes_study, labels_study, masks_study, site_data
from torch import nn

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData, TensorSet
from medfl.shared.errors import DataError
from medfl.simulations import load_simulation, run_experiment
from medfl.simulations.baselines import alone_and_ensemble, cyclic, pooled, trivial
from medfl.simulations.cli import print_attacks
from medfl.simulations.config import Attacker, Partition, SimulationSettings
from medfl.simulations.examples import load, shown
from medfl.simulations.findings import findings
from medfl.simulations.misbehaviour import backdoor_success, changed_update, marked, with_backdoor
from medfl.simulations.pictures import overlay, pictures
from medfl.simulations.report import write_report

CPU = torch.device("cpu")


def test_the_mark_is_a_bright_square_in_the_corner_and_nothing_else() -> None:
    images = torch.arange(2 * 16.0).view(2, 1, 4, 4)
    changed = marked(images) != images
    assert changed[0, 0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert marked(images)[1, 0, 0, 0] == 31.0  # as bright as the image's brightest


def test_a_backdoor_marks_its_share_of_the_training_images_only() -> None:
    data = site_data(classes_study())
    planted = with_backdoor(data, Attacker(kind="backdoor", target=1, share=0.5), seed=0)
    before, after = data.splits[Split.TRAIN], planted.splits[Split.TRAIN]
    changed = (before.inputs(torch.arange(len(before))) != after.images).flatten(1).any(1)
    assert int(changed.sum()) == round(0.5 * len(before))
    assert bool((after.labels[changed] == 1).all())
    assert planted.splits[Split.VALIDATION] is data.splits[Split.VALIDATION]
    with pytest.raises(DataError, match="one class"):
        with_backdoor(site_data(labels_study()), Attacker(kind="backdoor"), seed=0)


class SeesTheMark(nn.Module):
    """Says 0 where the corner is the brightest pixel, else 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = (images[:, 0, 0, 0] >= images.flatten(1).amax(1)).float()
        return torch.stack([bright, 1 - bright], 1)


def test_the_success_of_a_backdoor_counts_what_is_not_of_its_class_already() -> None:
    images = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    data = TensorSet(images, torch.tensor([0, 1, 1, 1]), torch.arange(4))
    assert backdoor_success(SeesTheMark(), data, 0) == 1.0
    assert backdoor_success(SeesTheMark(), data, 1) == 0.0
    everything = TensorSet(images, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    assert np.isnan(backdoor_success(SeesTheMark(), everything, 0))


def test_a_poisoned_update_may_be_scaled_to_replace_the_model() -> None:
    assert changed_update(np.ones(2, np.float32), Attacker(kind="backdoor", scale=4.0), "x").tolist() == [4.0, 4.0]


def lab(folder: Path, **changes: Any) -> SimulationSettings:
    return load_simulation(simulation(folder, **changes))


def test_a_site_that_is_held_out_does_not_train_and_every_method_is_scored_there(tmp_path: Path) -> None:
    settings = lab(tmp_path, partition={"sites": 4, "held_out": 1}, baselines={"cyclic": True}, seeds=[0, 1])
    experiment = run_experiment(settings, sweep=True)
    assert experiment.held_out == ("site-4",)
    assert set(experiment.sites) == {"site-1", "site-2", "site-3", "site-4"}
    for method in experiment.methods:
        assert np.isfinite(experiment.mean(method, "site-4")), method
        over_training = np.mean([experiment.mean(method, f"site-{n}") for n in (1, 2, 3)])
        assert experiment.interval(method).mean == pytest.approx(over_training)
    assert experiment.compare("fedavg", "alone").pairs == 3 * 2
    page = write_report(experiment, settings).read_text()
    assert "site-4 (held out)" in page
    assert any("over the mean of the others" in said for said in findings(experiment))


def test_nothing_of_a_held_out_site_is_seen_in_training() -> None:
    study = classes_study()
    sites = {name: site_data(study, seed=n) for n, name in enumerate("ab")}
    spoilt = site_data(study, seed=9)
    train = spoilt.splits[Split.TRAIN]
    nans = TensorSet(train.images.float() * float("nan"), train.labels, train.patients)
    away = {"c": SiteData({**spoilt.splits, Split.TRAIN: nans}, spoilt.report)}
    for found in (
        pooled(study, sites, away, device=CPU).scores,
        cyclic(study, sites, away, device=CPU).scores,
        *(one.scores for one in alone_and_ensemble(study, sites, away, device=CPU)),
    ):
        assert set(found) == {"a", "b", "c"}
        assert all(np.isfinite(score) for score in found.values())
    masks = masks_study()
    over_masks = trivial(masks, {"a": site_data(masks)}, {"c": site_data(masks, seed=1)})
    assert set(over_masks["mean mask"]) == {"a", "c"}


def test_a_backdoor_is_measured_and_a_robust_rule_resists_it(tmp_path: Path) -> None:
    attacker = {"kind": "backdoor", "target": 0, "share": 1.0, "scale": 8.0}
    settings = lab(
        tmp_path,
        partition={"sites": 5, "attackers": 1, "attacker": attacker},
        variants={"fedavg": {}, "median": {"strategy": {"name": "median"}}},
        baselines={"alone": False, "pooled": False, "trivial": False},
        seeds=[0],
    )
    experiment = run_experiment(settings, sweep=True)
    found = {cell.method: cell.backdoor for cell in experiment.cells}
    assert found["fedavg"] is not None
    assert found["median"] is not None
    assert found["fedavg"] > 0.8 > found["median"]
    console = Console(record=True, width=80)
    print_attacks(console, experiment)
    assert "of what it is meant for (median, seed 0)" in console.export_text()
    assert "backdoor works" in write_report(experiment, settings).read_text()


def test_slow_sites_show_in_the_curves(tmp_path: Path) -> None:
    settings = lab(
        tmp_path,
        partition={"sites": 4, "stragglers": 1, "slowness": 3},
        variants={"fedavg": {}, "fedbuff": {"strategy": {"name": "fedbuff"}}},
        baselines={"alone": False, "pooled": False, "trivial": False},
        seeds=[0],
    )
    experiment = run_experiment(settings, sweep=True)
    times = {cell.method: list(cell.times) for cell in experiment.cells}
    assert times["fedavg"] == [3.0, 6.0]
    assert times["fedbuff"] == [1.0, 2.0]
    assert "training times of a usual site" in write_report(experiment, settings).read_text()


def test_pictures_show_what_is_found_missed_and_falsely_found(tmp_path: Path) -> None:
    truth, said = np.array([[1, 1, 0, 0]]), np.array([[1, 0, 1, 0]])
    colours = overlay(np.full((1, 4, 3), 100, np.uint8), truth, said)[0]
    right, missed, false, nothing = (colour.tolist() for colour in colours)
    assert right[1] == max(right)  # green
    assert missed[2] == max(missed)  # blue
    assert false[0] == max(false)  # orange
    assert nothing == [75, 75, 75]
    assert pictures({}, ["fedavg"], ["a", "b"]) is None


def test_of_a_mask_the_image_with_most_of_it_is_shown_and_of_a_volume_its_slice() -> None:
    labels = torch.zeros((3, 2, 4, 4), dtype=torch.uint8)
    labels[1, 1, :2] = 1
    part = TensorSet(torch.zeros((3, 1, 2, 4, 4)), labels, torch.arange(3))
    data = SiteData({Split.VALIDATION: part}, site_data(classes_study()).report)
    assert shown(masks_study(), data) == (1, 1)


def test_pictures_are_left_out_where_the_file_says_so(tmp_path: Path) -> None:
    settings = lab(tmp_path, examples=False, seeds=[0], variants={"fedavg": {}})
    experiment = run_experiment(settings, sweep=True)
    assert load(experiment.folder / "seed-0" / "examples", experiment.methods) == {}
    assert "data:image/jpeg" not in write_report(experiment, settings).read_text()


def test_everybody_cannot_be_held_out() -> None:
    with pytest.raises(ValidationError, match="must be fewer than sites"):
        Partition(sites=4, attackers=1, stragglers=1, held_out=2)


def test_sites_that_do_not_train_from_the_start_do_not_make_a_quorum(tmp_path: Path) -> None:
    path = simulation(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["partition"] = {"sites": 3, "held_out": 2}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(Exception, match="there are 1 sites that train from round 1"):
        load_simulation(path)
