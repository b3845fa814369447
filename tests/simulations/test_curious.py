"""The coordinator as an attacker finds the picture where nothing protects it, and nothing where the study does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from consortium import write_pictures
from tiny import classes_study, masks_study, site_data

from medfl.shared.study import Study
from medfl.simulations import curious
from medfl.simulations.audit import real_step
from medfl.simulations.cli import main
from medfl.simulations.config import CuriousServer
from medfl.simulations.curious import Reconstruction, reconstruct
from medfl.simulations.findings import RECOGNISABLE_DB

PRIVATE = {"mode": "dp-sgd", "epsilon": 100, "delta": 1e-3, "clip_norm": 1.0, "noise_multiplier": 1.0}


def attack(study: Study, **how: Any) -> Reconstruction:
    torch.set_num_threads(1)
    sites = {f"site-{number}": site_data(study, seed=number) for number in range(5)}
    return reconstruct(study, sites, CuriousServer(steps=400), device=torch.device("cpu"), **how)


def test_in_clear_the_picture_is_found() -> None:
    # Logistic regression: the gradient is the picture times a number for each class, which the bias tells.
    found = attack(classes_study())
    assert found.found > RECOGNISABLE_DB > found.grey + 10, found


def test_a_sum_over_five_sites_shows_less_than_one_sites_step() -> None:
    secure = classes_study(secure_aggregation={"mode": "msa1"}, rounds={"minimum_sites": 5})
    assert attack(secure).found < attack(classes_study()).found - 10


def test_the_private_step_hides_the_picture_and_clipping_alone_does_not() -> None:
    private = classes_study(privacy=PRIVATE)
    assert attack(private, noise_multiplier=1e-6).found > RECOGNISABLE_DB
    assert attack(private, noise_multiplier=1.0).found < RECOGNISABLE_DB - 10


def test_at_the_client_level_the_coordinator_sees_the_sum_of_all_sites_and_the_noise_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, float]] = []

    def watched(*what: Any, **how: Any) -> Any:
        step = real_step(*what, **how)
        return lambda units, noise: (seen.append((len(units), noise)), step(units, noise))[1]

    monkeypatch.setattr(curious, "real_step", watched)
    privacy = {"mode": "client-level", "epsilon": 8, "delta": 1e-3, "noise_multiplier": 6.0}
    study = classes_study(privacy=privacy, secure_aggregation={"mode": "msa1"}, rounds={"minimum_sites": 5})
    assert attack(study, noise_multiplier=3.0).found < RECOGNISABLE_DB - 10  # 3: what a site's patient is charged
    assert seen == [(5, 6.0)]


def test_what_stays_at_a_site_is_not_seen() -> None:
    study = masks_study(strategy={"name": "personal-layers"})
    assert 0 < attack(study).found < 120


@pytest.mark.parametrize(
    ("privacy", "verdict"), [({"mode": "none"}, "the patient's picture"), (PRIVATE, "not recognisable")]
)
def test_a_file_may_ask_for_the_attack_and_is_told_what_came_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], privacy: dict[str, Any], verdict: str
) -> None:
    study = classes_study(privacy=privacy).model_dump(mode="json")
    content: dict[str, Any] = {"study": study, "sites": [], "output": "runs", "curious_server": {"steps": 400}}
    content |= {"device": "cpu", "baselines": {"unprotected": False}}
    for number, name in enumerate(("north", "south")):
        write_pictures(tmp_path / name, seed=number, masks=False)
        content["sites"].append({"name": name, "data": {"source": "table", "file": f"{name}/sites.csv"}})
    path = tmp_path / "simulation.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["--config", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "fedavg: from one step on a single image a curious coordinator makes a picture of" in said
    assert verdict in said
    (results,) = (tmp_path / "runs").glob("*/results.json")
    told = json.loads(results.read_text())["attacks_and_budgets"]["fedavg"]
    assert f"a picture of {told['reconstruction_db']:.1f} dB, where plain grey has {told['grey_db']:.1f}" in said
    assert ("epsilon" in told) == (privacy["mode"] != "none")


def test_a_victim_that_is_no_site_is_refused(tmp_path: Path) -> None:
    sites = [{"name": "north", "phantom": {"scanner": 0, "patients": 5}}]
    content = {"study": classes_study(rounds={"minimum_sites": 1}).model_dump(mode="json"), "sites": sites}
    path = tmp_path / "simulation.yaml"
    path.write_text(yaml.safe_dump(content | {"curious_server": {"site": "nroth"}}))
    assert main(["--config", str(path), "--check"]) == 2
