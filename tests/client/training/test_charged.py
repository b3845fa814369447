"""The plan of a private study at a site: what it refuses, what it tells before training, and what it keeps back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import classes_study, site_data

from medfl.client.data.splits import Split
from medfl.client.data.tensors import TensorSet
from medfl.client.privacy.ledger import Ceilings, Ledger
from medfl.client.training.charged import fix_plan
from medfl.shared.errors import DataError
from medfl.shared.privacy.accounting import epsilon
from medfl.shared.privacy.settings import DpSgd
from medfl.shared.study import Study


def private_study(**privacy: Any) -> Study:
    settings = {"mode": "dp-sgd", "epsilon": 8, "delta": 1e-2, "noise_multiplier": 2.0, "expected_batch": 2}
    return classes_study(privacy={**settings, "steps_per_round": 3, **privacy})


def settings_of(study: Study) -> DpSgd:
    assert isinstance(study.privacy, DpSgd)
    return study.privacy


def training_set(study: Study) -> TensorSet:
    return site_data(study, patients=4, images=2).splits[Split.TRAIN]


def open_ledger(folder: Path, *, total: float = 8.0) -> Ledger:
    return Ledger(folder / "ledger.jsonl", cohort="north", ceilings=Ceilings(8.0, total, 1e-2))


def test_a_patient_with_more_images_than_promised_is_refused_with_counts_only(tmp_path: Path) -> None:
    study = private_study(unit="image", images_per_patient=2)
    data = training_set(study)  # four patients with two images each
    more = TensorSet(data.images, data.labels, torch.tensor([0, 0, 0, 1, 1, 2, 2, 3]))
    with open_ledger(tmp_path) as ledger:
        with pytest.raises(DataError, match=r"1 of 4 patients .* is 2 \(the most here is 3\)"):
            fix_plan(ledger, study, settings_of(study), more)
        assert ledger.plan(study.digest) is None
        assert fix_plan(ledger, study, settings_of(study), data).images_per_patient == 2


def test_an_image_that_joins_a_patient_after_the_plan_is_refused_as_well(tmp_path: Path) -> None:
    study = private_study(unit="image", images_per_patient=2)
    data = training_set(study)
    with open_ledger(tmp_path) as ledger:
        fix_plan(ledger, study, settings_of(study), data)
        more = TensorSet(data.images, data.labels, torch.tensor([0, 0, 0, 1, 1, 2, 2, 3]))
        with pytest.raises(DataError):
            fix_plan(ledger, study, settings_of(study), more)


def test_what_is_spent_what_a_round_costs_and_how_many_are_left_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "medfl.site")
    study = private_study()
    with open_ledger(tmp_path) as ledger:
        plan = fix_plan(ledger, study, settings_of(study), training_set(study))
        fix_plan(ledger, study, settings_of(study), training_set(study))
    cost = epsilon([plan.round_cost], 1e-2)
    (told,) = [record.getMessage() for record in caplog.records if "next round" in record.getMessage()]
    assert f"has spent epsilon 0.000 of 8 on it and 0.000 in total; its next round brings that to {cost:.3f}" in told
    assert "all of its 2 rounds fit" in told


def test_a_site_whose_budget_ends_before_the_study_is_warned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study = private_study()
    once = epsilon([fixed_cost(study, tmp_path / "probe")], 1e-2)
    with open_ledger(tmp_path, total=1.05 * once) as ledger:
        fix_plan(ledger, study, settings_of(study), training_set(study))
    assert "1 of its 2 rounds fit" in next(r.getMessage() for r in caplog.records if "next round" in r.getMessage())
    assert any(record.levelno == logging.WARNING for record in caplog.records if "next round" in record.getMessage())


def fixed_cost(study: Study, folder: Path) -> Any:
    with open_ledger(folder) as ledger:
        return fix_plan(ledger, study, settings_of(study), training_set(study)).round_cost


def test_noise_is_solved_for_spare_rounds_too_so_that_a_crash_does_not_end_the_study(tmp_path: Path) -> None:
    # 2 rounds + 2 spare ones of 3 steps: twelve steps, not six, cost the promised epsilon
    study = private_study(noise_multiplier=None, spare_rounds=2)
    cost = fixed_cost(study, tmp_path)
    assert 7.9 < epsilon([cost.times(4)], 1e-2) <= 8
    assert epsilon([cost.times(5)], 1e-2) > 8
