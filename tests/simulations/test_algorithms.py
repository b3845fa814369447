"""Published properties of the algorithms on small made-up data, through the whole path from study to model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sites import make_site, offer, train
from tiny import classes_study, masks_study, report, site_data

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData, TensorSet
from medfl.client.records import FolderRecords
from medfl.shared.algorithms.travel import build_study_network
from medfl.shared.errors import ConfigError
from medfl.shared.messages import TrainReply
from medfl.shared.study import Study
from medfl.shared.weights import Flat
from medfl.simulations import misbehaviour
from medfl.simulations.config import Attacker, Failures
from medfl.simulations.federation import Federation, federate
from medfl.simulations.misbehaviour import with_flipped_labels

ROUNDS = 40


def skewed(label_share: float, count: int, *, seed: int, shift: float = 0.0) -> SiteData:
    """Pictures whose brightness says the class, ``label_share`` of them of class 1, all brighter by ``shift``."""
    draw = torch.Generator().manual_seed(seed)
    labels = (torch.arange(count) < label_share * count).long()
    images = torch.randn((count, 1, 4, 4), generator=draw) * 0.6 + shift
    images[:, 0, seed % 4] += 0.8 * (2 * labels[:, None] - 1)
    part = TensorSet(images, labels, torch.arange(count))
    splits = {Split.TRAIN: part, Split.VALIDATION: part, Split.TEST: part}
    return SiteData(splits, report(splits))


def study(strategy: dict[str, Any], **training: Any) -> Study:
    """Full-batch SGD on a strongly convex loss: one optimum, which drift away from it shows."""
    settings = {"batch_size": 512, "learning_rate": 0.3, "weight_decay": 0.05, "steps": 20} | training
    if settings.get("epochs"):
        settings["steps"] = None
    return classes_study(
        strategy=strategy,
        training=settings,
        rounds={"count": ROUNDS, "evaluate_every": ROUNDS},
        data={"preprocessing": {"normalise": "none", "size": [4, 4]}},
    )


def opposed() -> dict[str, SiteData]:
    """Two sites of opposite labels and different informative rows of pixels."""
    return {"a": skewed(0.9, 40, seed=0), "b": skewed(0.1, 40, seed=1)}


def one_site(made: Study) -> Study:
    return made.model_copy(update={"rounds": made.rounds.model_copy(update={"minimum_sites": 1})})


def pooled(sites: dict[str, SiteData]) -> SiteData:
    parts = [site.splits[Split.TRAIN] for site in sites.values()]
    images, labels = torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])
    whole = TensorSet(images, labels, torch.arange(len(labels)))
    splits = {Split.TRAIN: whole, Split.VALIDATION: whole, Split.TEST: whole}
    return SiteData(splits, report(splits))


@cache
def optimum(which: str) -> tuple[float, ...]:
    sites = opposed() if which == "opposed" else unequal()
    one = study({"name": "fedavg"}, steps=50)
    one = one.model_copy(update={"rounds": one.rounds.model_copy(update={"minimum_sites": 1})})
    return tuple(federate(one, {"all": pooled(sites)}).result.weights.tolist())


def distance(federation: Federation, which: str = "opposed") -> float:
    return float(np.linalg.norm(federation.result.weights - np.array(optimum(which), np.float32)))


@cache
def fed_avg() -> Federation:
    return federate(study({"name": "fedavg"}), opposed())


def unequal() -> dict[str, SiteData]:
    """Of unequal size, so that equal epochs are unequal numbers of steps."""
    return {"small": skewed(0.9, 16, seed=0), "large": skewed(0.1, 128, seed=1)}


def test_scaffold_reaches_the_common_optimum_where_fedavg_drifts() -> None:
    fedavg = distance(fed_avg())
    scaffold = distance(federate(study({"name": "scaffold"}), opposed()))
    assert fedavg > 0.05
    assert scaffold < 0.02 * fedavg


def uneven() -> dict[str, SiteData]:
    return {"few": skewed(0.9, 20, seed=0), "many": skewed(0.1, 60, seed=1)}


@cache
def best_of_uneven() -> tuple[Flat, float]:
    """The common optimum, and how far FedAvg stays away from it."""
    best = federate(one_site(study({"name": "fedavg"}, steps=50)), {"all": pooled(uneven())}).result.weights
    drifted = federate(study({"name": "fedavg"}), uneven()).result.weights
    return best, float(np.linalg.norm(drifted - best))


@pytest.mark.parametrize("settings", [{"name": "scaffold"}, {"name": "feddyn", "alpha": 0.3}], ids=lambda s: s["name"])
def test_answers_that_came_too_late_do_not_leave_sites_and_coordinator_apart(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def chance(text: str) -> float:  # "seed/site/how often asked": one site's answers 3 to 7 come too late
        return 0.0 if text.split("/")[1] == "few" and 3 <= int(text.split("/")[2]) <= 7 else 1.0

    monkeypatch.setattr(misbehaviour, "_uniform", chance)
    made = study(settings, steps=40)
    made = one_site(made)
    sites = uneven()
    late = federate(made, sites, failures=Failures(late=0.5))
    assert sum(what != "trained" for report in late.rounds for what in report.outcomes.values()) == 5
    best, drifted = best_of_uneven()
    assert float(np.linalg.norm(late.result.weights - best)) < 0.1 * drifted


def test_feddyn_reaches_the_common_optimum_where_fedavg_drifts() -> None:
    fedavg = distance(fed_avg())
    # Its local problems have to be solved, so that the sites' terms are their gradients: more steps.
    feddyn = distance(federate(study({"name": "feddyn", "alpha": 0.3}, steps=40), opposed()))
    assert feddyn < 0.1 * fedavg


def test_feddc_reaches_the_common_optimum_where_fedavg_drifts() -> None:
    feddc = distance(federate(study({"name": "feddc", "alpha": 0.1}), opposed()))
    assert feddc < 0.1 * distance(fed_avg())


def test_fedprox_drifts_less_than_fedavg() -> None:
    fedavg = distance(fed_avg())
    assert distance(federate(study({"name": "fedprox", "mu": 0.5}), opposed())) < 0.8 * fedavg


def test_fednova_does_not_let_the_site_with_more_steps_pull_the_model() -> None:
    training = {"epochs": 2, "batch_size": 8, "learning_rate": 0.05}
    fedavg = distance(federate(study({"name": "fedavg"}, **training), unequal()), "unequal")
    fednova = distance(federate(study({"name": "fednova"}, **training), unequal()), "unequal")
    assert fednova < 0.75 * fedavg


def test_fednova_is_fedavg_where_all_take_the_same_steps() -> None:
    other = federate(study({"name": "fednova"}), opposed()).result.weights
    assert np.allclose(fed_avg().result.weights, other, atol=1e-5)


def test_scaffold_with_one_site_is_plain_training() -> None:
    def alone(name: str) -> Flat:
        made = study({"name": name})
        made = made.model_copy(update={"rounds": made.rounds.model_copy(update={"minimum_sites": 1})})
        return federate(made, {"a": skewed(0.5, 40, seed=0)}).result.weights

    assert np.allclose(alone("scaffold"), alone("fedavg"), atol=1e-4)


def test_ditto_gives_each_site_a_model_of_its_own_that_is_better_there() -> None:
    sites = {"a": skewed(0.5, 40, seed=0, shift=1.5), "b": skewed(0.5, 40, seed=1, shift=-1.5)}
    both = {
        name: federate(study(settings), sites)
        for name, settings in {"fedavg": {"name": "fedavg"}, "ditto": {"name": "ditto", "pull": 0.01}}.items()
    }
    for site in sites:
        assert both["ditto"].site_scores[site]["loss"] < both["fedavg"].site_scores[site]["loss"]
    # the global model is FedAvg's, whatever the sites do at home
    assert np.array_equal(both["ditto"].result.weights, both["fedavg"].result.weights)


def test_moon_on_a_network_whose_representation_no_weight_changes_is_fedavg() -> None:
    moon = federate(study({"name": "moon"}), opposed()).result.weights
    # The representation of a network of one layer is the image itself, which no weight changes: exactly FedAvg.
    assert np.allclose(fed_avg().result.weights, moon, atol=1e-6)


def scaled(seed: int) -> SiteData:
    """The pixels that say the class are faint; others, which say nothing, are thirty times as bright."""
    draw, labels = torch.Generator().manual_seed(seed), torch.arange(40) % 2
    images = torch.randn((40, 1, 4, 4), generator=draw)
    images[:, 0, 1] += 1.5 * (2 * labels[:, None] - 1)
    part = TensorSet(images * torch.tensor([3.0, 0.1, 1.0, 1.0]).view(1, 1, 4, 1), labels, torch.arange(40))
    splits = {Split.TRAIN: part, Split.VALIDATION: part, Split.TEST: part}
    return SiteData(splits, report(splits))


@cache
def loss_on_scaled(name: str, *rate: float) -> float:
    made = study(
        {"name": name} | ({"learning_rate": rate[0]} if rate else {}), learning_rate=0.1, steps=2, weight_decay=0.0
    )
    made = made.model_copy(update={"rounds": made.rounds.model_copy(update={"count": 20, "evaluate_every": 20})})
    return float(federate(made, {site: scaled(seed) for seed, site in enumerate("abc")}).rounds[-1].scores["loss"])


@pytest.mark.parametrize(("name", "rate"), [("fedavgm", 1.0), ("fedadam", 0.5), ("fedyogi", 0.5), ("fedadagrad", 0.5)])
def test_momentum_and_adaptive_steps_at_the_server_find_faint_pixels_sooner_than_fedavg(name: str, rate: float) -> None:
    assert loss_on_scaled(name, rate) < 0.6 * loss_on_scaled("fedavg")


def spots(made: Study, seed: int, *, negative: bool = False, inverse: bool = False) -> SiteData:
    """Bright spots; from a camera whose pictures are negatives, or of readers who outline everything else."""
    data, splits = site_data(made, seed=seed, patients=8), {}
    for split, part in data.splits.items():
        images, labels = 3 - part.images if negative else part.images, 1 - part.labels if inverse else part.labels
        splits[split] = TensorSet(images, labels, part.patients)
    return SiteData(splits, report(splits))


@pytest.mark.parametrize(
    ("name", "norm", "other"),
    [("fedbn", "batch", {"negative": True}), ("personal-layers", "instance", {"inverse": True})],
)
def test_what_stays_home_helps_where_sites_differ_in_just_that(name: str, norm: str, other: dict[str, bool]) -> None:
    def losses(strategy: str) -> dict[str, float]:
        made = masks_study(
            strategy={"name": strategy},
            model={"name": "unet", "channels": [4, 8], "residual_units": 0, "norm": norm},
            training={"learning_rate": 0.03, "batch_size": 8, "epochs": 2},
            rounds={"count": 6, "evaluate_every": 6},
            data={"preprocessing": {"normalise": "none", "size": [8, 8]}},
        )
        scores = federate(made, {"a": spots(made, 0), "b": spots(made, 1, **other)}).site_scores
        return {site: found["loss"] for site, found in scores.items()}

    common, personal = losses("fedavg"), losses(name)
    assert all(personal[site] < 0.95 * common[site] for site in "ab")


def test_qfedavg_evens_out_the_losses_of_the_sites() -> None:
    sites = {"few": skewed(0.9, 16, seed=0), "many": skewed(0.1, 128, seed=1)}

    def gap(strategy: dict[str, Any]) -> float:
        scores = federate(study(strategy), sites).site_scores
        return abs(scores["few"]["loss"] - scores["many"]["loss"])

    assert gap({"name": "qfedavg", "q": 2.0}) < 0.7 * gap({"name": "fedavg"})


ROBUST = [
    {"name": "median"},
    {"name": "trimmed-mean", "trim": 0.3},
    {"name": "geometric-median", "iterations": 30},
    {"name": "krum", "malicious": 2, "keep": 3},
    {"name": "bulyan", "malicious": 1},
]


@pytest.mark.parametrize("strategy", ROBUST, ids=lambda s: s["name"])
def test_robust_rules_survive_sites_that_flip_their_updates_and_the_mean_does_not(strategy: dict[str, Any]) -> None:
    sites = {f"s{n}": skewed(0.5, 40, seed=4 * n) for n in range(7)}
    cheats = 1 if strategy["name"] == "bulyan" else 2
    attackers = {f"s{n}": Attacker(kind="sign-flip", scale=10.0 / cheats) for n in range(cheats)}
    changes = {"rounds": {"count": 15, "evaluate_every": 15, "minimum_sites": 7}}

    def loss(settings: dict[str, Any], cheating: dict[str, Attacker]) -> float:
        made = classes_study(
            strategy=settings, training={"learning_rate": 0.3, "steps": 5, "weight_decay": 0.05}, **changes
        )
        return federate(made, sites, attackers=cheating).rounds[-1].scores["loss"]

    honest = loss({"name": "fedavg"}, {})
    assert loss(strategy, attackers) < honest + 0.1
    assert loss({"name": "fedavg"}, attackers) > honest + 0.4


@pytest.mark.parametrize("strategy", ROBUST, ids=lambda s: s["name"])
def test_robust_rules_survive_sites_that_flip_their_labels_and_the_mean_does_not(strategy: dict[str, Any]) -> None:
    # two of seven sites, or the one that bulyan withstands, teach the opposite of what is right
    sites = {f"s{n}": skewed(0.5, 40, seed=4 * n) for n in range(7)}
    cheats = ("s0",) if strategy["name"] == "bulyan" else ("s0", "s1")
    flipped = {n: with_flipped_labels(d, 2) if n in cheats else d for n, d in sites.items()}

    def loss(settings: dict[str, Any], data: dict[str, SiteData]) -> float:
        made = classes_study(
            strategy=settings,
            training={"learning_rate": 0.3, "steps": 5, "weight_decay": 0.05},
            rounds={"count": 15, "evaluate_every": 15, "minimum_sites": 7},
        )
        scores = federate(made, data).site_scores
        honest = [scores[site]["loss"] for site in sites if site not in cheats]
        return sum(honest) / len(honest)

    honest = loss({"name": "fedavg"}, sites)
    broken = loss({"name": "fedavg"}, flipped)
    assert broken > 2 * honest
    assert loss(strategy, flipped) < honest + 0.1 * (broken - honest)


@pytest.mark.parametrize("name", ["scaffold", "fednova", "feddyn", "feddc", "ditto"])
def test_vectors_beside_the_model_go_through_secure_sums_as_they_go_in_clear(name: str) -> None:
    sites = {f"s{n}": skewed(0.2 + 0.2 * n, 20 + 4 * n, seed=n) for n in range(4)}
    rounds = {"count": 3, "evaluate_every": 3, "minimum_sites": 4}
    clear, masked = (
        federate(
            classes_study(
                strategy={"name": name},
                training={"epochs": 2, "steps": None, "batch_size": 8},
                rounds=rounds,
                secure_aggregation={"mode": mode, "clip": 8.0},
            ),
            sites,
        ).result
        for mode in ("none", "msa1")
    )
    assert clear.round == masked.round == 3
    assert np.abs(clear.weights - masked.weights).max() < 1e-4


@pytest.mark.parametrize("name", ["fedbn", "personal-layers"])
def test_layers_that_stay_at_the_sites_are_left_out_of_secure_sums_as_they_are_in_clear(name: str) -> None:
    clear, masked = (
        masks_study(
            strategy={"name": name},
            model={"name": "unet", "channels": [4, 8], "residual_units": 0, "norm": "group"},
            training={"learning_rate": 0.05, "optimizer": "sgd"},
            rounds={"count": 2, "evaluate_every": 2, "minimum_sites": 4},
            secure_aggregation={"mode": mode},
        )
        for mode in ("none", "msa1")
    )
    sites = {f"s{n}": site_data(clear, seed=n) for n in range(4)}
    results = [federate(made, sites).result for made in (clear, masked)]
    assert [result.round for result in results] == [2, 2]
    assert np.abs(results[0].weights - results[1].weights).max() < 1e-4
    whole = sum(value.numel() for value in build_study_network(clear).state_dict().values())
    assert results[0].weights.size < whole  # something stayed


@pytest.mark.parametrize("name", ["scaffold", "feddyn", "feddc", "ditto"])
def test_what_a_site_keeps_survives_a_restart_and_is_not_counted_twice(name: str, tmp_path: Path) -> None:
    made = study({"name": name})
    data = skewed(0.3, 20, seed=0)
    length = 2 * 16 + 2
    beside = np.full(length, 0.01, np.float32) if name in ("scaffold", "feddc") else np.zeros(0, np.float32)
    asked = [np.concatenate([np.full(length, 0.1 * n, np.float32), beside]) for n in (1, 2)]

    def answer(site: Any, number: int) -> Flat:
        return TrainReply.parse(train(site, made, asked[number - 1], number)).update

    through = make_site(made, tmp_path / "through", data=data, records=FolderRecords(tmp_path / "one"))
    offer(through, made)
    expected = [answer(through, 1), answer(through, 2)]

    first = make_site(made, tmp_path / "first", data=data, records=FolderRecords(tmp_path / "two"))
    offer(first, made)
    answer(first, 1)
    (tmp_path / "two" / "studies" / made.digest / "answer.safetensors").unlink()  # killed before it was kept
    again = make_site(made, tmp_path / "again", data=data, records=FolderRecords(tmp_path / "two"))
    assert np.array_equal(answer(again, 1), expected[0])
    later = make_site(made, tmp_path / "later", data=data, records=FolderRecords(tmp_path / "two"))
    assert np.array_equal(answer(later, 2), expected[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategy": {"name": "scaffold"}, "training": {"optimizer": "adam"}}, "training.optimizer sgd"),
        ({"strategy": {"name": "scaffold"}, "training": {"momentum": 0.9}}, "without training.momentum"),
        ({"strategy": {"name": "fednova"}, "training": {"optimizer": "adam"}}, "fedprox or feddyn"),
        ({"strategy": {"name": "bulyan", "malicious": 1}}, "minimum_sites of at least 7, or strategy median"),
        # of 4 sites a fifth is none: the plain mean; two liars in 6 may look like a neighbourhood of their own
        (
            {"strategy": {"name": "trimmed-mean"}, "rounds": {"minimum_sites": 4}},
            "minimum_sites of at least 5, or strategy median",
        ),
        (
            {"strategy": {"name": "krum", "malicious": 2}, "rounds": {"minimum_sites": 6}},
            "minimum_sites of at least 7, or strategy median",
        ),
        (
            {"strategy": {"name": "krum", "malicious": 1, "keep": 4}, "rounds": {"minimum_sites": 6}},
            "minimum_sites of at least 7, or strategy median",
        ),
        (
            {
                "strategy": {"name": "ditto"},
                "privacy": {"mode": "dp-sgd", "epsilon": 8, "delta": 1e-5, "clip_norm": 1, "expected_batch": 4},
            },
            "private training does not do",
        ),
    ],
)
def test_a_study_that_its_algorithm_cannot_train_is_refused_with_the_way_out(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        classes_study(**changes)


def test_layers_that_the_network_does_not_have_are_told_with_those_it_has() -> None:
    made = classes_study(strategy={"name": "personal-layers", "layers": ["head"]})
    with pytest.raises(ConfigError, match="has no head: its last layers are 1"):
        federate(made, {"a": site_data(made), "b": site_data(made)})


def test_personal_layers_that_leave_nothing_to_send_are_refused() -> None:
    made = classes_study(strategy={"name": "personal-layers"})  # the last layer of a network of one layer
    with pytest.raises(ConfigError, match="leaves nothing to send"):
        federate(made, {"a": site_data(made), "b": site_data(made)})
