"""``medfl-sim``: from one file to results, and the baselines beside the federation."""

from __future__ import annotations

import csv
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from consortium import write_pictures
from safetensors import safe_open
from tiny import classes_study, labels_study, masks_study, noise_data, site_data

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData, TensorSet
from medfl.client.training.evaluate import evaluate
from medfl.client.workbench import make_bench
from medfl.shared.config import load_settings
from medfl.shared.errors import ConfigError, TrainingError
from medfl.shared.metrics import read
from medfl.shared.secagg.exchange import Phase
from medfl.shared.study import Study
from medfl.simulations import load_simulation
from medfl.simulations import one_seed as module
from medfl.simulations.baselines import alone_and_ensemble, best_threshold, mean_mask, pooled, trivial
from medfl.simulations.cli import main
from medfl.simulations.config import SimulationSettings
from medfl.simulations.experiment import run_experiment
from medfl.simulations.federation import federate

CPU = torch.device("cpu")


def masks(*rows: list[float]) -> TensorSet:
    """Pictures of 1x4 pixels; brightness above 0.5 is the mask."""
    images = torch.tensor(rows).view(len(rows), 1, 1, 4)
    return TensorSet(images, (images[:, 0] > 0.5).to(torch.uint8), torch.arange(len(rows)))


def test_the_best_threshold_finds_what_is_bright() -> None:
    data = masks([0.1, 0.2, 0.8, 0.9], [0.9, 0.1, 0.3, 0.7])
    assert best_threshold(data, data, 2) == pytest.approx(1.0)


def test_the_best_threshold_finds_what_is_dark() -> None:
    data = masks([0.1, 0.2, 0.8, 0.9], [0.9, 0.1, 0.3, 0.7])
    dark = TensorSet(1 - data.images, data.labels, data.patients)
    assert best_threshold(dark, dark, 2) == pytest.approx(1.0)


def test_the_mean_mask_is_one_mask_for_all() -> None:
    train = masks([1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0])
    held_out = masks([1, 1, 0, 0], [0, 0, 1, 1])
    # the best fixed mask is the first two pixels: Dice 1 on the first patient, 0 on the second
    assert mean_mask(train, held_out, 2) == pytest.approx(0.5)


def test_a_constant_prediction_is_at_chance() -> None:
    for study, chance in ((classes_study(), 0.5), (labels_study(), 0.5)):
        assert trivial(study, {"a": site_data(study)}) == {"commonest class": {"a": chance}}


def test_a_site_alone_trains_as_much_as_in_the_federation() -> None:
    study = classes_study()
    data = site_data(study)
    one = study.model_copy(update={"rounds": study.rounds.model_copy(update={"minimum_sites": 1})})
    expected = federate(one, {"a": data}).site_scores["a"]["balanced_accuracy"]
    assert alone_and_ensemble(study, {"a": data}, device=CPU)[0].scores == {"a": expected}


def test_pooled_training_keeps_patients_of_different_sites_apart() -> None:
    study = masks_study()
    scores = pooled(study, {"a": site_data(study), "b": site_data(study, seed=1)}, device=CPU).scores
    assert set(scores) == {"a", "b"}
    assert all(0 <= score <= 1 for score in scores.values())


def simulation(folder: Path, study: Study, **changes: Any) -> Path:
    content = {
        "study": study.model_dump(mode="json"),
        "sites": [],
        "seeds": [0, 1],
        "output": "runs",
        "device": "cpu",
        **changes,
    }
    for number, name in enumerate(("north", "south")):
        write_pictures(folder / name, seed=number, masks=study.task.value == "segmentation")
        content["sites"].append({"name": name, "data": {"source": "table", "file": f"{name}/sites.csv"}})
    path = folder / "simulation.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


STUDY = masks_study(rounds={"count": 2})


def test_one_command_gives_a_table_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(simulation(tmp_path, STUDY))]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    for words in ("fedavg", "pooled", "alone", "ensemble", "best threshold", "mean mask", "north", "south"):
        assert words in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == f"tiny-{STUDY.digest[:8]}"
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 2 * 2  # methods, sites, seeds
    summary = json.loads((folder / "results.json").read_text())
    assert summary["study"] == STUDY.digest
    assert summary["patients"] == {"north": 12, "south": 12}
    for method in ("fedavg", "alone"):
        by_hand = [float(row["score"]) for row in rows if (row["method"], row["site"]) == (method, "north")]
        assert summary["mean"][method]["north"] == pytest.approx(sum(by_hand) / 2, abs=1e-6)
    for seed in (0, 1):
        with safe_open(folder / f"seed-{seed}" / "model.safetensors", framework="numpy") as model:
            assert model.metadata()["round"] == "2"
        assert len((folder / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_scores_of_a_study_that_hands_out_its_best_round_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = classes_study(
        training={"learning_rate": 2.0, "steps": 3},
        rounds={"count": 6, "converged": {"rounds": 3, "gain": 0.0}},
    )
    data = {name: noise_data(seed) for seed, name in enumerate(("north", "south"))}
    monkeypatch.setattr(module, "load_sites", lambda *_: data)
    only = {"alone": False, "pooled": False, "trivial": False}
    path = simulation(tmp_path, study, seeds=[0], baselines=only, examples=False)
    experiment = run_experiment(load_settings(path, SimulationSettings))
    with safe_open(experiment.folder / "seed-0" / "model.safetensors", framework="numpy") as file:
        model, of_round = {name: torch.from_numpy(file.get_tensor(name)) for name in file.keys()}, file.metadata()  # noqa: SIM118
    (cell,) = experiment.cells
    best = max(cell.curve, key=lambda point: point[1])
    assert int(of_round["round"]) == best[0] < cell.curve[-1][0]
    bench = make_bench(study, CPU)
    bench.network.load_state_dict(model)
    for name, its in data.items():
        expected = read(evaluate(bench.network, its.splits[Split.VALIDATION], study))["balanced_accuracy"]
        assert cell.scores[name] == expected


def test_cyclic_training_beside_a_private_study_says_that_it_is_without_privacy(tmp_path: Path) -> None:
    privacy = {"mode": "dp-sgd", "epsilon": 100, "delta": 1e-2, "noise_multiplier": 4.0, "steps_per_round": 1}
    study = classes_study(privacy=privacy, rounds={"count": 1})
    only = {"alone": False, "pooled": False, "trivial": False, "unprotected": False, "cyclic": True}
    experiment = run_experiment(
        load_settings(simulation(tmp_path, study, seeds=[0], baselines=only), SimulationSettings)
    )
    assert experiment.methods == ["fedavg", "cyclic without privacy"]
    assert (experiment.folder / "seed-0" / "examples" / "cyclic without privacy.npz").exists()


def test_a_notebook_hears_nothing_of_the_libraries(tmp_path: Path) -> None:
    said: list[logging.LogRecord] = []
    flower = logging.getLogger("flwr")
    loud = logging.Handler()
    loud.emit = said.append  # type: ignore[method-assign]
    flower.handlers[:], level = [loud], flower.level
    flower.setLevel(logging.INFO)
    try:
        run_experiment(load_simulation(simulation(tmp_path, STUDY, seeds=[0])))
    finally:
        flower.setLevel(level)
        flower.handlers[:] = []
    assert said == []


def test_the_same_file_gives_the_same_scores(tmp_path: Path) -> None:
    only = {"alone": False, "pooled": False, "trivial": False}
    path = simulation(tmp_path, STUDY, seeds=[3], baselines=only)
    first, again = (run_experiment(load_settings(path, SimulationSettings)) for _ in range(2))
    assert first.rows == again.rows
    assert first.methods == ["fedavg"]


def test_check_reads_the_data_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(simulation(tmp_path, STUDY)), "--check"]) == 0
    assert "north: 12 patients, 12 images" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_check_tells_what_is_left_out_and_a_run_warns_of_it(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = simulation(tmp_path, STUDY, baselines={"alone": False, "pooled": False, "trivial": False})
    (tmp_path / "south" / "p3.png").write_bytes(b"no picture")
    assert main(["--config", str(path), "--check"]) == 0
    said = capsys.readouterr()
    (line,) = [line for line in said.out.splitlines() if "left out" in line]
    assert line.startswith("site south: left out: ")
    assert line.endswith(" (1)")
    assert "south: 11 patients, 11 images" in said.out
    assert "left out" not in said.err
    monkeypatch.setattr(logging.getLogger("medfl"), "propagate", True)
    with caplog.at_level("WARNING", "medfl.simulations"):
        run_experiment(load_simulation(path))
    assert [record.getMessage() for record in caplog.records if record.name == "medfl.simulations"] == [line]


def test_check_counts_each_part_of_a_partition_and_looks_at_every_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = simulation(tmp_path, STUDY, partition={"sites": 2, "by": "quantity", "alpha": 0.7}, seeds=[0, 1, 2])
    content = yaml.safe_load(path.read_text())
    content["sites"] = content["sites"][:1]
    path.write_text(yaml.safe_dump(content))
    assert main(["--config", str(path), "--check"]) == 0
    said = capsys.readouterr().out.splitlines()
    counts = [int(line.split(": ")[1].split()[0]) for line in said[:2]]
    assert sum(counts) == 12
    assert [line.split(":")[0] for line in said[:3]] == ["site-1", "site-2", "site-1 with seed 1"]

    content["partition"] |= {"by": "iid"}
    content["sites"][0]["data"]["split"] = {
        "validation": 0.2,
        "test": 0.2,
    }  # two validation patients, whatever the seed
    path.write_text(yaml.safe_dump(content))
    assert main(["--config", str(path), "--check"]) == 0
    content["partition"]["sites"] = 3
    path.write_text(yaml.safe_dump(content))
    assert main(["--config", str(path), "--check"]) == 4
    assert "seed 0: partition: 2 validation patients are too few for 3 sites" in capsys.readouterr().err


def test_a_study_that_diverges_everywhere_is_told_and_leaves_no_model(tmp_path: Path) -> None:
    study = classes_study(
        training={"learning_rate": 10.0, "weight_decay": 1.0, "steps": 20, "momentum": 0.99},
        rounds={"patience_s": 120},
    )
    with pytest.raises(TrainingError, match="too many rounds in a row"):
        run_experiment(load_settings(simulation(tmp_path, study, seeds=[0]), SimulationSettings))
    assert not list(tmp_path.rglob("model.safetensors"))


def test_a_baseline_that_diverges_has_no_score_and_does_not_stop_the_rest() -> None:
    study = classes_study()
    data = site_data(study)
    train = data.splits[Split.TRAIN]
    bad = TensorSet(train.images * float("nan"), train.labels, train.patients)
    sites = {"good": data, "bad": SiteData({**data.splits, Split.TRAIN: bad}, data.report)}
    scores = alone_and_ensemble(study, sites, device=CPU)[0].scores
    assert math.isnan(scores["bad"])
    assert 0 <= scores["good"] <= 1


@pytest.mark.parametrize(
    ("damage", "status", "words"),
    [
        ({"sites": "twice"}, 2, "sites must have names that differ"),
        ({"study": {"rounds": {"minimum_sites": 3}}}, 2, "minimum_sites is 3, there are 2 sites"),
        (
            {"variants": {"x": {"strategy": {"name": "scaffold"}}}},
            2,
            "x: Value error, strategy scaffold is defined for",
        ),
        ({"variants": {"alone": {}}}, 2, "alone is the name of a baseline"),
        ({"variants": {"trivial": {}}}, 2, "trivial is the name of a baseline"),
        (
            {"variants": {"x": {"secure_aggregation": {"mode": "msa1"}}}},
            2,
            "a secure sum takes 3 sites, there are 2 sites that train",
        ),
        ({"partition": {"sites": 3}}, 2, "partition divides the data of one site"),
        ({"seedz": [1]}, 2, "(did you mean 'seeds'?)"),
        ({"device": "cuda"}, 4, "device: cuda was asked for"),
    ],
)
def test_what_is_wrong_ends_with_its_status_and_a_line_that_names_it(
    tmp_path: Path,
    damage: dict[str, Any],
    status: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = simulation(tmp_path, STUDY)
    content = yaml.safe_load(path.read_text())
    if damage.get("sites"):
        content["sites"][1]["name"] = "north"
    elif "study" in damage:
        content["study"]["rounds"] |= damage["study"]["rounds"]
    else:
        content |= damage
    path.write_text(yaml.safe_dump(content))
    assert main(["--config", str(path)]) == status
    assert words in capsys.readouterr().err


def test_a_strategy_that_needs_single_updates_is_refused_under_secure_sums(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = simulation(tmp_path, STUDY)
    content = yaml.safe_load(path.read_text())
    content["sites"].append({**content["sites"][0], "name": "east"})
    content["variants"] = {"x": {"strategy": {"name": "median"}, "secure_aggregation": {"mode": "msa1"}}}
    path.write_text(yaml.safe_dump(content))
    assert main(["--config", str(path)]) == 2
    assert "strategy median compares single updates, which secure aggregation hides" in capsys.readouterr().err


def test_a_site_whose_data_are_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = simulation(tmp_path, STUDY)
    (tmp_path / "south" / "sites.csv").unlink()
    assert main(["--config", str(path)]) == 4
    assert "site south: " in capsys.readouterr().err


def test_a_site_that_holds_nobody_out_is_named_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = simulation(tmp_path, STUDY)
    content = yaml.safe_load(path.read_text())
    content["sites"][1]["data"]["split"] = {"validation": 0.0, "test": 0.2}
    path.write_text(yaml.safe_dump(content))
    for options in ([], ["--check"]):
        assert main(["--config", str(path), *options]) == 4
        assert "site south has no held-out patients, and every method is scored on them: set" in capsys.readouterr().err


def test_a_path_of_a_simulation_counts_from_its_file(tmp_path: Path) -> None:
    settings = load_settings(simulation(tmp_path, STUDY), SimulationSettings)
    assert settings.output == tmp_path / "runs"


def test_neither_file_nor_command_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2


def test_seeds_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seeds"):
        load_settings(simulation(tmp_path, STUDY, seeds=[]), SimulationSettings)


def test_phases_of_secure_sums_are_named_in_the_file_and_need_a_secure_sum(tmp_path: Path) -> None:
    def read(mode: str, phase: str) -> SimulationSettings:
        study = classes_study(secure_aggregation={"mode": mode}, rounds={"minimum_sites": 3})
        path = simulation(tmp_path, study, failures={"phases": {"masked_input": 0.1, phase: 0.2}})
        content = yaml.safe_load(path.read_text())
        content["sites"].append({**content["sites"][0], "name": "east"})
        path.write_text(yaml.safe_dump(content))
        return load_settings(path, SimulationSettings)

    assert read("msa1", "unmask").failures.phases == {Phase.MASKED_INPUT: 0.1, Phase.UNMASK: 0.2}
    with pytest.raises(ConfigError, match="no study here has one"):
        read("none", "unmask")
    with pytest.raises(ConfigError, match="phases"):
        read("msa1", "unmasking")
