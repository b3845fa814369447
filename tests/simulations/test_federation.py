"""Whole studies through the production apps on the grid in this process."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from tiny import classes_study, labels_study, masks_study, site_data

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData, TensorSet
from medfl.client.training.evaluate import evaluate
from medfl.client.training.plain import train_plain
from medfl.client.workbench import make_bench
from medfl.server.checkpoint import CheckpointFolder
from medfl.server.ending import Ending
from medfl.server.summation import FixedPointSum
from medfl.shared.metrics import add, read
from medfl.shared.study import Study
from medfl.simulations.federation import Federation, federate, permissive_policy

CPU = torch.device("cpu")


def sites(study: Study, count: int = 3) -> dict[str, SiteData]:
    return {f"site-{n}": site_data(study, seed=n, patients=3 + n) for n in range(count)}


@pytest.mark.parametrize(
    ("study", "score"),
    [
        (masks_study(rounds={"count": 8}, training={"learning_rate": 0.05, "batch_size": 2}), "dice"),
        (classes_study(rounds={"count": 8}, training={"steps": 8}), "balanced_accuracy"),
        (labels_study(rounds={"count": 8}, training={"steps": 8}), "balanced_accuracy"),
    ],
    ids=["segmentation", "classification", "multi-label"],
)
def test_each_task_is_learnt_from_end_to_end(study: Study, score: str) -> None:
    federation = federate(study, sites(study))
    assert (federation.result.ending, federation.result.round) == (Ending.DONE, 8)
    first, last = federation.rounds[0], federation.rounds[-1]
    assert last.training["loss"] < 0.8 * first.training["loss"]
    assert last.scores[score] > 0.75
    assert set(federation.site_scores) == set(sites(study))
    assert all(score in scores for scores in federation.site_scores.values())


@pytest.mark.parametrize(
    "strategy", ["fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "trimmed-mean", "median", "krum"]
)
def test_every_strategy_runs_a_study(strategy: str) -> None:
    needs = {"trim": 0.4} if strategy == "trimmed-mean" else {}
    study = classes_study(strategy={"name": strategy, **needs}, rounds={"minimum_sites": 3})
    result = federate(study, sites(study)).result
    assert result.ending is Ending.DONE
    assert np.isfinite(result.weights).all()


def test_fedbn_runs_a_study_and_its_tensors_stay_home() -> None:
    study = masks_study(
        strategy={"name": "fedbn"}, model={"name": "unet", "channels": [4, 8], "residual_units": 0, "norm": "batch"}
    )
    result = federate(study, sites(study)).result
    assert result.ending is Ending.DONE
    assert not any("running_mean" in name for name, _ in result.layout.tensors)


def by_hand(study: Study, data: dict[str, SiteData]) -> tuple[Any, list[float]]:
    """The same federation as a plain loop: no messages, no grid, no strategy objects."""
    import hashlib

    bench = make_bench(study, CPU)
    weights, losses = bench.layout.flatten(bench.network.state_dict()), []
    for number in range(1, study.rounds.count + 1):
        total = FixedPointSum(weights.size)
        tallies = []
        for name, its in data.items():
            bench.load(weights, None)
            seed = hashlib.sha256(f"{study.seed}/{name}/{number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little") >> 1)
            tallies.append(train_plain(bench.network, its.splits[Split.TRAIN], study, generator=generator))
            total.add(bench.update_from(weights), len(its.splits[Split.TRAIN]))
        weights = weights + total.mean()
        losses.append(read(add(tallies))["loss"])
    return weights, losses


@pytest.mark.parametrize("study", [classes_study(rounds={"count": 3}), masks_study()], ids=["classes", "masks"])
def test_a_simulation_is_bit_for_bit_the_plain_loop_of_the_same_arithmetic(study: Study) -> None:
    data = sites(study)
    federation = federate(study, data)
    weights, losses = by_hand(study, data)
    assert federation.result.weights.tobytes() == weights.tobytes()
    assert [report.training["loss"] for report in federation.rounds] == pytest.approx(losses)


def test_scores_by_site_are_those_of_the_final_model_on_each_sites_held_out_patients() -> None:
    study = masks_study()
    data = sites(study)
    federation = federate(study, data)
    bench = make_bench(study, CPU)
    bench.load(federation.result.weights, None)
    for name, its in data.items():
        expected = read(evaluate(bench.network, its.splits[Split.VALIDATION], study))
        assert federation.site_scores[name] == pytest.approx(expected)


def test_the_order_of_sites_does_not_change_the_model() -> None:
    study = classes_study()
    data = sites(study)
    forward, backward = (federate(study, dict(order)).result for order in (data.items(), reversed(data.items())))
    assert forward.weights.tobytes() == backward.weights.tobytes()


def test_a_simulation_goes_on_from_its_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    study, stop = classes_study(rounds={"count": 4}), Event()
    data = sites(study)
    whole = federate(study, data).result

    class StopAfterTwo:
        def __getattr__(self, name: str) -> Any:
            return lambda *a, **k: stop.set() if name == "finished_round" and a[0].round == 2 else None

    half = federate(study, data, checkpoints=CheckpointFolder(tmp_path), reporter=StopAfterTwo(), stop=stop).result
    assert (half.ending, half.round) == (Ending.STOPPED, 2)
    rest = federate(study, data, checkpoints=CheckpointFolder(tmp_path)).result
    assert rest.weights.tobytes() == whole.weights.tobytes()


def test_a_site_whose_training_diverges_does_not_stop_the_others() -> None:
    study = classes_study()
    data = sites(study)
    good = data["site-1"].splits[Split.TRAIN]
    bad = TensorSet(good.images * float("nan"), good.labels, good.patients)
    data["site-1"] = SiteData({**data["site-1"].splits, Split.TRAIN: bad}, data["site-1"].report)
    federation = federate(study, data)
    assert federation.result.ending is Ending.DONE
    assert federation.rounds[0].outcomes == {"site-0": "trained", "site-1": "training", "site-2": "trained"}


def test_a_virtual_site_permits_its_study_and_no_other() -> None:
    policy = permissive_policy(classes_study())
    assert policy.studies == (classes_study().digest,)
    assert policy.allow_no_privacy
    private = masks_study(privacy={"mode": "dp-sgd", "epsilon": 3.0})
    assert not permissive_policy(private).allow_no_privacy
    assert permissive_policy(private).max_epsilon_per_study == 3.0


def test_the_last_scores_are_found_when_the_last_round_was_not_scored() -> None:
    study = classes_study(rounds={"count": 3, "evaluate_every": 2})
    federation: Federation = federate(study, sites(study))
    assert [bool(report.scores) for report in federation.rounds] == [False, True, True]
    assert set(federation.site_scores) == set(sites(study))
