"""Private training draws its own units: what a study, a transform or a loss might bring in changes none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from sites import make_site, offer, policy_for
from tiny import classes_study, labels_study, masks_study, site_data
from torch import Tensor, nn

from medfl.client.data.splits import Split
from medfl.client.privacy.clipped import UnitData
from medfl.client.privacy.patient_gradient import StepFacts
from medfl.client.training import private
from medfl.client.training.private import require_private_training, train_private
from medfl.shared.algorithms.travel import build_study_network
from medfl.shared.errors import Code, ConfigError
from medfl.shared.losses import StudyLoss, build_loss
from medfl.shared.messages import Failure, OfferAccepted
from medfl.shared.privacy.plan import TrainingPlan
from medfl.shared.privacy.settings import DpSgd, Unit
from medfl.shared.study import Loss, Study

PRIVACY = {"mode": "dp-sgd", "epsilon": 8, "delta": 1e-2, "noise_multiplier": 2.0, "expected_batch": 2}
ALLOWED = {"max_epsilon_per_study": 8, "max_epsilon_total": 8, "max_delta": 1e-2}


def averaged_over_the_batch(loss: Loss) -> StudyLoss:
    """As a loss with class weights would be: an image's part depends on the others."""
    known = build_loss(loss)
    return replace(known, each=lambda logits, labels: known.mean(logits, labels).expand(len(logits)))


@pytest.mark.parametrize("study_of", [classes_study, labels_study, masks_study])
def test_every_kind_of_study_is_accepted(study_of: Any) -> None:
    study = study_of(privacy=PRIVACY)
    require_private_training(build_study_network(study), site_data(study).splits[Split.TRAIN], study, study.privacy)


@pytest.mark.parametrize("study_of", [classes_study, labels_study, masks_study])
def test_a_loss_that_couples_images_is_refused_when_the_study_is_offered(
    study_of: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(privacy=PRIVACY)
    site = make_site(study, tmp_path, policy=policy_for(study, **ALLOWED))
    assert OfferAccepted.parse(offer(site, study)) == OfferAccepted()
    monkeypatch.setattr(private, "build_loss", averaged_over_the_batch)
    assert Failure.parse(offer(site, study)).code is Code.CONFIGURATION


def test_a_network_that_mixes_patients_is_refused() -> None:
    study = classes_study(privacy=PRIVACY)
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(ConfigError, match="layer 0 is a BatchNorm"):
        require_private_training(network, site_data(study).splits[Split.TRAIN], study, DpSgd(**PRIVACY))  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", list(Unit))
def test_all_that_transforms_make_of_a_unit_is_clipped_as_one(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    def four_crops(images: Tensor, labels: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
        return images.repeat_interleave(4, 0), labels.repeat_interleave(4, 0)

    steps: list[Sequence[UnitData]] = []

    def watched(network: object, loss: object, units: Sequence[UnitData], **_: object) -> StepFacts:
        steps.append(units)
        return StepFacts(len(units), torch.tensor(0), torch.tensor(0))

    monkeypatch.setattr(private, "augmenter", lambda _: four_crops)
    monkeypatch.setattr(private, "private_gradients", watched)
    study = classes_study(privacy=PRIVACY)
    images = {"images_per_patient": 2} if unit is Unit.IMAGE else {"slices_per_patient": None}
    settings = DpSgd(**{**PRIVACY, "unit": unit, **images})  # type: ignore[arg-type]
    everybody = TrainingPlan(unit, 8, 1e-2, 1.0, 2.0, 1.0, 2.0, 3)
    data = site_data(study, patients=4, images=2).splits[Split.TRAIN]
    train_private(build_study_network(study), data, study, settings, everybody)
    # four patients of two images, four crops of each image
    assert [[len(rows) for rows, _ in units] for units in steps] == 3 * [[8] * 4 if unit is Unit.PATIENT else [4] * 8]


def section(**settings: object) -> dict[str, Any]:
    return dict(settings)


@pytest.mark.parametrize(
    "brought_in",
    [
        {"training": section(sampler="weighted")},
        {"training": section(shuffle=True)},
        {"training": section(class_weights=[1.0, 5.0])},
        {"training": section(ignore_index=255)},
        {"training": section(loss="dice-over-the-batch")},
        {"data": section(num_samples=4)},
        {"data": section(augmentation={"num_samples": 4})},
    ],
    ids=str,
)
def test_what_would_couple_patients_cannot_be_written_into_a_study(brought_in: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sampler|shuffle|class_weights|ignore_index|loss|num_samples"):
        classes_study(privacy=PRIVACY, **brought_in)
    assert isinstance(classes_study(privacy=PRIVACY), Study)


def test_the_sites_log_says_what_was_clipped_and_what_was_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = iter([StepFacts(5, torch.tensor(1), torch.tensor(3)), StepFacts(0, torch.tensor(0), torch.tensor(0))])
    monkeypatch.setattr(private, "private_gradients", lambda *_, **__: next(steps))
    study = classes_study(privacy=PRIVACY)
    plan = TrainingPlan(Unit.PATIENT, 8, 1e-2, 1.0, 2.0, 0.5, 2.0, 2)
    data = site_data(study).splits[Split.TRAIN]
    with caplog.at_level("INFO", "medfl.site"):
        train_private(build_study_network(study), data, study, DpSgd(**PRIVACY), plan, round_number=7)  # type: ignore[arg-type]
    assert [record.getMessage() for record in caplog.records] == [
        "round 7: 5 gradients, 3 of them longer than the clip",
        "round 7: 1 of 5 gradients were not finite and were left out: lower training.learning_rate, or look at the "
        "intensities",
    ]
