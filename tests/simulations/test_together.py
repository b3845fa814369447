from __future__ import annotations

import numpy as np
import pytest
from tiny import classes_study, site_data

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.client.training import stacked
from medfl.server.ending import Ending
from medfl.simulations import together
from medfl.simulations.config import Failures
from medfl.simulations.federation import federate

STUDY = classes_study(rounds={"count": 4, "minimum_sites": 1}, training={"batch_size": 3, "steps": 4})


def sites(count: int = 5) -> dict[str, SiteData]:
    """The last one has more patients than the others."""
    return {f"site-{n}": site_data(STUDY, seed=n, patients=5 + 3 * (n == count - 1)) for n in range(count)}


def test_a_batched_study_ends_where_the_usual_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []

    def counted(bench, sets, *args, **how):  # type: ignore[no-untyped-def]
        groups.append(len(sets))
        return stacked.train_stacked(bench, sets, *args, **how)

    monkeypatch.setattr(together, "train_stacked", counted)
    usual, batched = federate(STUDY, sites()), federate(STUDY, sites(), at_once=3)
    assert groups == [3] * 4  # a round: three at once; of the two left, one has other shapes: each by itself
    assert np.abs(usual.result.weights - batched.result.weights).max() < 1e-6
    assert [r.training["loss"] for r in batched.rounds] == pytest.approx([r.training["loss"] for r in usual.rounds])
    assert {name: len(rows) for name, rows in batched.site_rows.items()} == {
        name: len(rows) for name, rows in usual.site_rows.items()
    }


def test_sites_that_fail_are_missing_from_the_batch_as_without_it() -> None:
    how = Failures(drop_out=0.4)
    usual, batched = federate(STUDY, sites(), failures=how), federate(STUDY, sites(), failures=how, at_once=5)
    assert [r.outcomes for r in batched.rounds] == [r.outcomes for r in usual.rounds]
    assert np.abs(usual.result.weights - batched.result.weights).max() < 1e-6


def test_a_site_that_diverges_costs_nobody_else_the_round() -> None:
    its = sites()
    images = its["site-1"].splits[Split.TRAIN].images
    images.copy_(images.float().fill_(0))
    data = its["site-1"].splits[Split.TRAIN]
    spoilt = type(data)(data.images.float() * float("nan"), data.labels, data.patients)
    whole = {name: SiteData({k: type(v)(v.images.float(), v.labels, v.patients) for k, v in d.splits.items()}, d.report)
             for name, d in its.items()}  # fmt: skip
    whole["site-1"] = SiteData({**whole["site-1"].splits, Split.TRAIN: spoilt}, whole["site-1"].report)
    done = federate(STUDY, whole, at_once=4)
    assert done.result.ending is Ending.DONE
    assert [r.outcomes["site-1"] for r in done.rounds] == ["training"] * 4
    assert all(r.outcomes["site-2"] == "trained" for r in done.rounds)
