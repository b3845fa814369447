"""What stands beside a federation, and that all of it is scored on the models that are handed out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import classes_study, masks_study, noise_data, site_data

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.client.training.evaluate import evaluate
from medfl.client.workbench import make_bench
from medfl.shared.metrics import headline, read
from medfl.shared.study import Study
from medfl.simulations import baselines
from medfl.simulations.baselines import score_at_the_end
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
