"""What stands beside a federation, and that all of it is scored on the models that are handed out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import classes_study, labels_study, masks_study, noise_data, report, site_data

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData, TensorSet
from medfl.client.training.evaluate import evaluate
from medfl.client.workbench import make_bench
from medfl.shared.metrics import headline, read
from medfl.shared.privacy.settings import DpSgd, NoPrivacy
from medfl.shared.safeguards import Safeguards
from medfl.shared.study import Study, Training
from medfl.simulations import baselines
from medfl.simulations.baselines import alone_and_ensemble, cyclic, one_place, pooled, score_at_the_end, trivial
from medfl.simulations.federation import Federation, federate

CPU = torch.device("cpu")


def noisy_study(**changes: Any) -> Study:
    return classes_study(
        **{"training": {"learning_rate": 2.0, "steps": 3}, "rounds": {"count": 6, "minimum_sites": 2}} | changes
    )


def by_hand(study: Study, federation: Federation, data: dict[str, SiteData]) -> dict[str, float]:
    """Scores of the model that the study ended with, and of what each site has kept, as the product reads them."""
    bench, scores = make_bench(study, CPU), {}
    for name, its in data.items():
        bench.load_for_patients(study, federation.result.weights, federation.kept.get(name))
        found = headline(read(evaluate(bench.network, its.splits[Split.VALIDATION], study)))
        assert found is not None
        scores[name] = found[1]
    return scores


def last_scored(federation: Federation) -> dict[str, float]:
    """What each site has said last of any model."""
    rows = {name: [row for row in rows if row["set"] == "validation"] for name, rows in federation.site_rows.items()}
    return {name: rows[name][-1]["scores"]["balanced_accuracy"] for name in rows if rows[name]}


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": {"count": 3, "minimum_sites": 2, "sites_per_round": 2}},
        {"rounds": {"count": 6, "minimum_sites": 2, "converged": {"rounds": 3, "gain": 0.0}}},
        {"safeguards": {"max_fall": 0.001}},
    ],
    ids=["some sites a round", "the best round", "taken back"],
)
def test_scores_are_those_of_the_model_that_is_handed_out(changes: dict[str, Any]) -> None:
    study, data = noisy_study(**changes), {name: noise_data(seed) for seed, name in enumerate("abcd")}
    federation = federate(study, data)
    expected = by_hand(study, federation, data)
    assert last_scored(federation) != expected, "another model was scored last, or not at all sites"
    assert score_at_the_end(study, federation, data, device=CPU) == expected


@pytest.mark.parametrize("strategy", ["fedavg", "fedbn", "personal-layers", "ditto"])
def test_what_was_scored_last_is_not_scored_again(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = masks_study(
        strategy={"name": strategy}, model={"name": "unet", "channels": [4, 8], "residual_units": 0, "norm": "batch"}
    )
    data = {name: site_data(study, seed=seed) for seed, name in enumerate("ab")}
    federation = federate(study, data)
    assert (strategy != "fedavg") == bool(federation.kept)
    expected = by_hand(study, federation, data)
    scored: list[float] = []
    monkeypatch.setattr(baselines, "evaluate", lambda *_: scored.append(1.0))
    assert score_at_the_end(study, federation, data, device=CPU) == expected
    assert scored == []


def dp_sgd(**changes: Any) -> Study:
    """Noise that costs far less than what is promised, so that nothing has to be solved."""
    privacy = {"mode": "dp-sgd", "epsilon": 100, "delta": 1e-2, "noise_multiplier": 4.0, "steps_per_round": 3}
    return classes_study(privacy=privacy | changes, training={"steps": None, "epochs": 30})


def test_what_is_trained_in_one_place_is_a_study_with_nobody_to_distrust() -> None:
    guarded = classes_study(safeguards={"max_norm": 0.1}, rounds={"converged": {"rounds": 1}, "patience_s": 86400})
    one = one_place(guarded)
    assert one.safeguards == Safeguards()
    assert one.rounds.converged is None
    assert one.rounds.patience_s < 60
    assert Study.model_validate_json(one.canonical()) == one


def test_client_level_noise_is_on_a_sum_over_sites_and_one_place_trains_without() -> None:
    privacy = {"mode": "client-level", "epsilon": 50, "delta": 1e-2, "noise_multiplier": 1.0}
    study = classes_study(privacy=privacy, secure_aggregation={"mode": "msa1"}, rounds={"minimum_sites": 3})
    sites = {name: site_data(study, seed=seed) for seed, name in enumerate("abc")}
    for found in (pooled(study, sites, device=CPU), *alone_and_ensemble(study, sites, device=CPU)):
        assert isinstance(found.study.privacy, NoPrivacy)
        assert all(0 <= score <= 1 for score in found.scores.values())


def test_pooled_takes_as_many_private_steps_as_all_sites_together() -> None:
    study = dp_sgd()
    found = pooled(study, {name: site_data(study, seed=seed) for seed, name in enumerate("ab")}, device=CPU)
    assert isinstance(found.study.privacy, DpSgd)
    assert found.study.privacy.steps_per_round == 2 * 3
    assert all(0 <= score <= 1 for score in found.scores.values())


def test_cyclic_takes_the_steps_of_a_private_round_without_privacy(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Training] = []
    really = baselines.train_plain

    def train(network: Any, data: Any, its: Study, **more: Any) -> Any:
        trained.append(its.training)
        return really(network, data, its, **more)

    monkeypatch.setattr(baselines, "train_plain", train)
    study = dp_sgd()
    found = cyclic(study, {name: site_data(study, seed=seed) for seed, name in enumerate("ab")}, device=CPU)
    assert [training.steps for training in trained] == [3] * 4  # two sites, two times around
    assert isinstance(found.study.privacy, NoPrivacy)


def test_a_study_that_one_place_refuses_for_ever_has_no_score_and_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(baselines, "_PATIENCE_S", 0.1)
    study = dp_sgd(delta=0.2)  # right for the 4 patients who train at each site, too large for 8
    study = study.model_copy(update={"rounds": study.rounds.model_copy(update={"patience_s": 60.0})})
    found = pooled(study, {name: site_data(study, seed=seed) for seed, name in enumerate("ab")}, device=CPU)
    assert all(math.isnan(score) for score in found.scores.values())
    assert found.models == {}
    assert "pooled has no score: training ended after round 0: too few sites took part" in caplog.text


def test_a_site_that_diverges_alone_has_no_part_in_the_ensemble_and_ends_the_cycle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(baselines, "_PATIENCE_S", 0.01)
    study = noisy_study()
    good, bad = noise_data(0), noise_data(1)
    train = bad.splits[Split.TRAIN]
    spoilt = TensorSet(train.images * float("nan"), train.labels, train.patients)
    sites = {"good": good, "bad": SiteData({**bad.splits, Split.TRAIN: spoilt}, bad.report)}
    one, all_ = alone_and_ensemble(study, sites, {"away": noise_data(2)}, device=CPU)
    assert math.isnan(one.scores["bad"])
    assert set(one.models) == {"good"}
    assert one.scores["away"] == all_.scores["away"], "the mean over one model"
    assert all(math.isnan(score) for score in cyclic(study, sites, device=CPU).scores.values())
    nobody, nothing = alone_and_ensemble(study, {"bad": sites["bad"]}, {"away": noise_data(2)}, device=CPU)
    assert math.isnan(nobody.scores["away"])
    assert all(math.isnan(score) for score in nothing.scores.values())


def labelled(train: list[Any], held_out: list[Any], dtype: torch.dtype = torch.int64) -> SiteData:
    """4x4 pictures with these labels, one for each patient."""
    parts = {Split.TRAIN: train, Split.VALIDATION: held_out, Split.TEST: held_out}
    splits = {
        split: TensorSet(torch.zeros((len(its), 1, 4, 4)), torch.tensor(its, dtype=dtype), torch.arange(len(its)))
        for split, its in parts.items()
    }
    return SiteData(splits, report(splits))


def test_the_commonest_class_is_that_of_each_site_and_scored_over_the_classes_that_are_there() -> None:
    study = classes_study(data={"classes": ["x", "y", "z"]})
    sites = {
        "one class": labelled([0, 0, 0], [0, 0]),
        "two classes": labelled([0, 1, 1], [0, 1, 1]),
        "another": labelled([2, 2, 1], [0, 1, 1]),
    }
    found = trivial(study, sites, {"away": labelled([1], [0, 0])})["commonest class"]
    # the mean recall of the classes among the held-out: 1; (0 + 1) / 2; nobody held out is z; the three sites together
    # have 4 of x, 3 of y and 2 of z
    assert found == {"one class": 1.0, "two classes": 0.5, "another": 0.0, "away": 1.0}


def test_the_commonest_answer_of_each_label_has_no_score_where_no_label_occurs_both_ways() -> None:
    study = labels_study()
    sites = {
        "both ways": labelled([[1, 1], [0, 1], [0, 1]], [[1, 0], [0, 1]], torch.float32),
        "one way": labelled([[1, 1]], [[1, 1], [1, 1]], torch.float32),
    }
    found = trivial(study, sites)["commonest class"]
    assert found["both ways"] == 0.5
    assert math.isnan(found["one way"])
