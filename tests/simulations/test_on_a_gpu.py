"""Everything once more on a GPU that is only pretended: the same numbers, and no tensor meets one of another device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pretended_gpu import CPU, GPU, pretended_gpu
from small_simulation import simulation
from tiny import classes_study, labels_study, masks_study, site_data

from medfl.client.data.tensors import SiteData, TensorSet
from medfl.shared.study import Study
from medfl.simulations import load_simulation, run_experiment
from medfl.simulations.federation import Federation, federate

GROUPED = {"name": "unet", "channels": [4, 8], "residual_units": 0, "norm": "group"}
SITES = 5


def sites(study: Study, device: torch.device) -> dict[str, SiteData]:
    return {f"site-{number}": on(site_data(study, seed=number), device) for number in range(SITES)}


def on(data: SiteData, device: torch.device) -> SiteData:
    splits = {
        split: TensorSet(part.images.to(device), part.labels.to(device), part.patients.to(device))
        for split, part in data.splits.items()
    }
    return SiteData(splits, data.report)


def on_both(study: Study, monkeypatch: pytest.MonkeyPatch) -> tuple[Federation, Federation]:
    """What comes of ``study`` on the processor, and on the pretended GPU."""
    expected = federate(study, sites(study, CPU), device=CPU)
    with pretended_gpu(monkeypatch):
        return expected, federate(study, sites(study, GPU), device=GPU)


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "fedavg"},
        {"name": "fedprox"},
        {"name": "fedavgm"},
        {"name": "fedadam"},
        {"name": "fedbn"},
        {"name": "personal-layers", "layers": ["model.2"]},
        {"name": "scaffold"},
        {"name": "fednova"},
        {"name": "feddyn"},
        {"name": "feddc"},
        {"name": "ditto"},
        {"name": "moon"},
        {"name": "qfedavg"},
        {"name": "geometric-median"},
        {"name": "trimmed-mean"},
        {"name": "krum"},
        {"name": "fedbuff"},
    ],
    ids=lambda strategy: strategy["name"],
)
def test_a_federation_on_a_gpu_gives_what_it_gives_on_a_processor(
    strategy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = masks_study(
        strategy=strategy,
        model=GROUPED,
        training={"optimizer": "sgd" if strategy["name"] in ("scaffold", "fednova", "feddc") else "adam"},
        rounds={"count": 2, "minimum_sites": SITES},
    )
    expected, found = on_both(study, monkeypatch)
    assert np.array_equal(found.result.weights, expected.result.weights)
    assert found.site_scores == expected.site_scores


@pytest.mark.parametrize(
    "changes",
    [
        {"secure_aggregation": {"mode": "msa1"}},
        {"training": {"train_only": "head"}},
        {"training": {"train_only": "adapters", "adapter_rank": 2}},
        {"training": {"optimizer": "adamw", "weight_decay": 0.1, "decay": "cosine"}},
        {"model": {**GROUPED, "weight_standardisation": True}},
        {"model": {**GROUPED, "norm": "batch"}},
        {"model": {**GROUPED, "dropout": 0.2}},
        {"rounds": {"count": 2, "minimum_sites": SITES, "average_last": 2}},
    ],
    ids=repr,
)
def test_a_study_on_a_gpu_gives_what_it_gives_on_a_processor(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = masks_study(**{"model": GROUPED, "rounds": {"count": 2, "minimum_sites": SITES}} | changes)
    expected, found = on_both(study, monkeypatch)
    assert np.array_equal(found.result.weights, expected.result.weights)


def test_noise_of_the_site_itself_is_made_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    privacy = {"mode": "client-level", "epsilon": 8, "delta": 1e-3, "noise_multiplier": 6.0}
    study = masks_study(
        model=GROUPED,
        privacy=privacy,
        secure_aggregation={"mode": "msa1"},
        rounds={"count": 1, "minimum_sites": SITES},
    )
    with pretended_gpu(monkeypatch):
        found = federate(study, sites(study, GPU), device=GPU)
    assert np.isfinite(found.result.weights).all()
    assert found.result.round == 1


@pytest.mark.parametrize("study", [classes_study(), labels_study()], ids=["classes", "labels"])
def test_small_models_of_several_sites_train_as_one_on_a_gpu(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, found = on_both(study, monkeypatch)
    assert np.array_equal(found.result.weights, expected.result.weights)
    assert found.site_scores == expected.site_scores


@pytest.mark.parametrize(
    ("privacy", "images"),
    [
        ({"unit": "patient"}, 1),
        ({"unit": "patient"}, 3),
        ({"unit": "patient", "slices_per_patient": 1, "augmentations": 2}, 3),
        ({"unit": "image", "images_per_patient": 3}, 3),
        ({"unit": "image", "images_per_patient": 3, "engine": "opacus"}, 3),
        ({"unit": "patient", "engine": "loop"}, 3),
    ],
    ids=lambda value: "-".join(f"{v}" for v in value.values()) if isinstance(value, dict) else f"{value} images",
)
def test_private_training_runs_on_a_gpu(privacy: dict[str, Any], images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    study = masks_study(
        model=GROUPED,
        privacy={"mode": "dp-sgd", "epsilon": 8, "delta": 0.01, "expected_batch": 3, "steps_per_round": 2, **privacy},
        rounds={"count": 1, "minimum_sites": 2},
        data={"augmentation": {"flip": True, "intensity": 0.1}},
    )
    with pretended_gpu(monkeypatch):
        data = {f"site-{n}": on(site_data(study, seed=n, images=images), GPU) for n in range(2)}
        found = federate(study, data, device=GPU).result
    assert np.isfinite(found.weights).all()
    assert found.round == 1


WHOLE = {
    "partition": {
        "sites": 4,
        "attackers": 1,
        "attacker": {"kind": "backdoor", "target": 1},
        "scanners": [{}, {"gamma": 1.5, "noise": 0.1, "bias_field": 0.2}],
    },
    "baselines": {"cyclic": True},
    "curious_server": {"steps": 2},
    "seeds": [0],
    "device": "cuda",
}


def test_a_whole_simulation_of_pictures_runs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = simulation(tmp_path, **WHOLE)
    with pretended_gpu(monkeypatch):
        experiment = run_experiment(load_simulation(path), sweep=True)
    assert {"fedavg", "fedprox", "alone", "pooled", "cyclic", "commonest class"} <= set(experiment.methods)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_whole_simulation_of_ct_runs_on_a_gpu(
    dimensions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spacing, size = ([8.0, 8.0], [32, 32]) if dimensions == 2 else ([12.0, 8.0, 8.0], [8, 32, 32])
    study = masks_study(
        model=GROUPED,
        rounds={"count": 1, "minimum_sites": 2},
        data={
            "modality": "ct",
            "dimensions": dimensions,
            "classes": ["background", "lesion"],
            "label_map": {"Lesion": "lesion"},
            "preprocessing": {"normalise": "window", "window": [-50, 200], "spacing_mm": spacing, "size": size},
            "augmentation": {"flip": True, "rotate_degrees": 10, "elastic": 0.1, "bias_field": 0.1, "noise": 0.1},
        },
    )
    content = {
        "study": study.model_dump(mode="json", exclude_none=True),
        "sites": [{"name": n, "phantom": {"scanner": s, "patients": 6}} for s, n in enumerate(("north", "south"))]
        + [{"name": "island", "held_out": True, "phantom": {"scanner": 2, "patients": 6}}],
        "output": "runs",
        "device": "cuda",
        "curious_server": {"steps": 2},
    }
    path = tmp_path / "simulation.yaml"
    path.write_text(yaml.safe_dump(content))
    with pretended_gpu(monkeypatch):
        experiment = run_experiment(load_simulation(path))
    assert {"fedavg", "alone", "pooled", "ensemble", "best threshold", "mean mask"} == set(experiment.methods)
    assert {row.site for row in experiment.rows} == {"north", "south", "island"}
