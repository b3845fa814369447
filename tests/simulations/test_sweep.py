"""A sweep: every variant for every seed, taken up where it stopped, with a report that stands by itself."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_simulation import example, simulation

from medfl.shared.errors import ConfigError
from medfl.simulations import Experiment, load_simulation, run_experiment
from medfl.simulations import one_seed as module
from medfl.simulations.cli import main
from medfl.simulations.findings import findings
from medfl.simulations.report import references, write_report
from medfl.simulations.results import Cell


def count_federations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []
    really = module.federate

    def federate(study: Any, *arguments: Any, **more: Any) -> Any:
        done.append(f"{study.strategy.name}/{study.seed}")
        return really(study, *arguments, **more)

    monkeypatch.setattr(module, "federate", federate)
    return done


def test_a_sweep_goes_on_where_it_stopped_and_does_only_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = simulation(tmp_path)
    done = count_federations(monkeypatch)
    first = run_experiment(load_simulation(path), sweep=True)
    assert done == ["fedavg/0", "fedprox/0", "fedavg/1", "fedprox/1"]

    done.clear()
    again = run_experiment(load_simulation(path), sweep=True)
    assert done == []
    assert again.rows == first.rows
    assert again.patients == first.patients
    assert again.scored == first.scored
    assert all(0 < first.scored[site] < count for site, count in first.patients.items())
    assert json.loads((first.folder / "results.json").read_bytes())["scored_patients"] == first.scored
    indices = [json.loads(file.read_bytes()) for file in first.folder.glob("seed-*/cells/*.json")]
    assert again.seconds > sum(index["seconds"] for index in indices if "methods" in index) > 0.1, "done before"
    assert json.loads((again.folder / "results.json").read_bytes())["seconds"] == round(again.seconds, 1)

    (first.folder / "seed-1" / "cells" / "fedprox.fedprox.json").write_text("damaged")
    assert run_experiment(load_simulation(path), sweep=True).rows == first.rows
    assert done == ["fedprox/1"]

    done.clear()
    content = yaml.safe_load(path.read_text())
    content["variants"]["stronger"] = {"strategy": {"name": "fedprox", "mu": 1.0}}
    path.write_text(yaml.safe_dump(content))
    assert run_experiment(load_simulation(path), sweep=True).methods[:3] == ["fedavg", "fedprox", "stronger"]
    assert done == ["fedprox/0", "fedprox/1"]

    done.clear()
    before = content["failures"]
    content["failures"] = {"drop_out": 0.2}  # changes every number
    path.write_text(yaml.safe_dump(content))
    with_failures = run_experiment(load_simulation(path), sweep=True)
    assert len(done) == 6
    assert with_failures.folder.parent == first.folder.parent

    done.clear()
    content["failures"] = before
    path.write_text(yaml.safe_dump(content))
    without = run_experiment(load_simulation(path), sweep=True)
    assert done == [], "the other simulation has overwritten nothing"
    assert (without.folder, without.folder != with_failures.folder) == (first.folder, True)

    done.clear()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")  # another release may give other numbers
    run_experiment(load_simulation(path), sweep=True)
    assert len(done) == 6


def test_fedavg_stands_beside_whatever_is_compared_and_once_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    few = {"alone": False, "pooled": False, "trivial": False}
    path = simulation(tmp_path, seeds=[0], variants={"near": {"strategy": {"name": "fedprox"}}}, baselines=few)
    done = count_federations(monkeypatch)
    with caplog.at_level("INFO", "medfl.simulations"):
        experiment = run_experiment(load_simulation(path), sweep=True)
    assert done == ["fedprox/0", "fedavg/0"]
    assert (experiment.methods_of("federated"), experiment.methods_of("baseline")) == (["near"], ["fedavg"])
    assert references(experiment) == ["fedavg"]
    assert [r.getMessage() for r in caplog.records if r.name == "medfl.simulations"] == [
        "seed 0, method 1 of 2: near",
        "seed 0, method 2 of 2: fedavg",
    ]
    assert not list(experiment.folder.rglob("fedavg/model.safetensors"))

    done.clear()
    content = yaml.safe_load(path.read_text())
    content["variants"]["plain"] = {}  # which is FedAvg
    path.write_text(yaml.safe_dump(content))
    assert run_experiment(load_simulation(path), sweep=True).methods == ["near", "plain"]

    content["variants"] = {"fedavg": {"strategy": {"name": "fedprox"}}}  # two methods of one name
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="variants: fedavg is the name of a baseline"):
        load_simulation(path)


def test_an_ensemble_that_is_asked_for_later_is_made(tmp_path: Path) -> None:
    few = {"alone": True, "ensemble": False, "pooled": False, "trivial": False}
    path = simulation(tmp_path, seeds=[0], variants={"fedavg": {}}, baselines=few)
    assert run_experiment(load_simulation(path), sweep=True).methods == ["fedavg", "alone"]
    content = yaml.safe_load(path.read_text())
    content["baselines"]["ensemble"] = True
    path.write_text(yaml.safe_dump(content))
    assert run_experiment(load_simulation(path), sweep=True).methods == ["fedavg", "alone", "ensemble"]


def test_a_variant_that_diverges_is_named_and_keeps_no_other_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = {"learning_rate": 10.0, "optimizer": "sgd", "weight_decay": 1.0, "momentum": 0.99, "steps": 50}
    few = {"alone": False, "pooled": True, "trivial": False}
    path = simulation(
        tmp_path,
        seeds=[0],
        variants={"wild": {"training": wild}, "near": {"strategy": {"name": "fedprox"}}},
        baselines=few,
    )
    done = count_federations(monkeypatch)
    assert main(["--config", str(path), "--sweep"]) == 1
    failed, rest = capsys.readouterr().err.splitlines()[-2:]
    assert failed.startswith(
        "medfl-sim: wild, seed 0: study example ended after round 0 of 2: too many rounds in a row"
    )
    assert sorted(done) == ["fedavg/0", "fedprox/0"]
    (folder,) = (tmp_path / "runs").iterdir()
    assert rest.startswith(f"medfl-sim: all else is in {folder}; ")
    assert "no score" in (folder / "report.html").read_text()
    scores = {(row["method"], row["site"]): row["score"] for row in csv.DictReader((folder / "results.csv").open())}
    assert scores["wild", "site-1"] == "nan"
    assert all(float(scores[method, "site-1"]) >= 0 for method in ("near", "pooled"))

    done.clear()
    assert main(["--config", str(path), "--sweep"]) == 1
    assert capsys.readouterr().err.splitlines()[-2:] == [failed, rest]
    assert done == []

    content = yaml.safe_load(path.read_text())
    content["variants"]["wild"]["training"] = {"learning_rate": 0.01}
    path.write_text(yaml.safe_dump(content))
    assert main(["--config", str(path), "--sweep"]) == 0
    assert done == ["fedavg/0"]
    assert not run_experiment(load_simulation(path), sweep=True).to_dataframe()["score"].isna().any()


def test_the_example_runs_and_its_report_stands_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = example()
    loaded.SIMULATION["seeds"] = [0]
    experiment = loaded.main(tmp_path)
    page = (experiment.folder / "report.html").read_text()
    assert "scaffold against fedavg" in capsys.readouterr().out
    assert page.count("<svg") == 3  # curves, heat map, bytes
    for words in ("What it says", "commonest class", "pooled", "ensemble", "site-8", "against alone"):
        assert words in page
    # nothing from elsewhere: the only addresses are names of XML namespaces
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page.replace("xlink:href", "").replace('href="#', ""))
    assert page.count("data:image/jpeg") == 8  # one image a site
    assert "<script" not in page
    assert json.loads((experiment.folder / "results.json").read_text())["seeds"] == [0]


def test_the_report_says_where_a_federated_model_loses(tmp_path: Path) -> None:
    def cell(method: str, score: float, kind: str) -> Cell:
        return Cell(method, 0, {"a": score, "b": 0.9}, kind)

    cells = (cell("fedavg", 0.4, "federated"), cell("alone", 0.7, "baseline"), cell("best <threshold>", 0.5, "trivial"))
    experiment = Experiment("dice", cells, tmp_path, 1.0)
    said = findings(experiment)
    assert "a: the best federated method (fedavg) loses 0.300 over training alone." in said
    assert "No method is as good as training alone everywhere. fedavg comes nearest, and loses at a (by 0.300)." in said
    assert "fedavg does not beat a predictor without any training at: a, b." in said
    assert references(experiment) == ["fedavg", "alone"]
    page = write_report(experiment, load_simulation(simulation(tmp_path))).read_text()
    assert "best &lt;threshold&gt;" in page
    assert "pooled, alone, ensemble and cyclic have every site in every round" in page
    assert (
        "same number of optimizer steps in every\nround that it is in" in page
    )  # and where rounds ask few, fewer in all


def test_scores_are_drawn_against_epsilon_beside_those_without_privacy(tmp_path: Path) -> None:
    def cell(method: str, score: float, epsilon: float | None) -> Cell:
        return Cell(method, 0, {"a": score, "b": score / 2}, "federated", epsilon=epsilon)

    settings = load_simulation(simulation(tmp_path))
    cells = (cell("eps1", 0.4, 1.0), cell("eps8", 0.6, 8.0), cell("free", 0.7, None))
    page = write_report(Experiment("dice", cells, tmp_path, 1.0), settings).read_text()
    figure = page[page.index("Privacy against score") :]
    for words in (">epsilon<", ">1<", ">8<", "without privacy"):
        assert words in figure
    one = write_report(Experiment("dice", cells[1:], tmp_path, 1.0), settings).read_text()
    assert "Privacy against score" not in one  # a single point is no curve


def test_importing_the_laboratory_does_not_import_torch() -> None:
    check = "import sys, medfl.simulations, medfl.simulations.cli; sys.exit(len({'torch', 'flwr'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_a_sweep_that_is_interrupted_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"alone": False, "pooled": False, "trivial": False}
    path = simulation(tmp_path, seeds=[0], baselines=few)
    done = count_federations(monkeypatch)
    counted = module.federate

    def interrupted(study: Any, *arguments: Any, **more: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        return counted(study, *arguments, **more)

    monkeypatch.setattr(module, "federate", interrupted)
    assert main(["--config", str(path), "--sweep"]) == 130
    printed = capsys.readouterr()
    assert "what is finished stays: the same command goes on from there" in printed.out
    assert printed.err.endswith("medfl-sim: interrupted\n")

    monkeypatch.setattr(module, "federate", counted)
    assert main(["--config", str(path), "--sweep"]) == 0
    assert done == ["fedavg/0", "fedprox/0"]
