"""The smallest studies and data that still go through everything: 4x4 pictures for classes, 8x8 for masks."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from medfl.client.data.report import DataReport
from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData, TensorSet
from medfl.shared.study import Study

LOGISTIC_VALUES = 2 * 16 + 2
"""Values of the logistic model of :func:`classes_study`: two classes, 16 pixels, two biases."""


def classes_study(**changes: Any) -> Study:
    """Two classes of 4x4 pictures, logistic regression. ``changes`` replace top-level sections; dicts are merged."""
    return _study(
        {
            "name": "tiny",
            "task": "classification",
            "data": {
                "modality": "photo",
                "dimensions": 2,
                "classes": ["no", "yes"],
                "preprocessing": {"normalise": "scale_255", "size": [4, 4]},
            },
            "model": {"name": "logistic", "inputs": 16},
            "training": {"loss": "cross-entropy", "optimizer": "sgd", "learning_rate": 0.5, "steps": 2},
            "rounds": {"count": 2, "minimum_sites": 2, "deadline_s": 30, "patience_s": 5},
            "privacy": {"mode": "none"},
            "secure_aggregation": {"mode": "none"},
        },
        changes,
    )


def labels_study(**changes: Any) -> Study:
    """Two labels that a 4x4 picture may have or not."""
    base = classes_study().model_dump(mode="json")
    base["data"] |= {"multi_label": True, "classes": ["round", "bright"]}
    base["training"] |= {"loss": "binary-cross-entropy"}
    return _study(base, changes)


def masks_study(**changes: Any) -> Study:
    """Masks on 8x8 pictures, a U-Net of two levels."""
    base = classes_study().model_dump(mode="json") | {
        "task": "segmentation",
        "model": {"name": "unet", "channels": [4, 8], "residual_units": 0, "norm": "instance"},
    }
    base["data"] |= {"classes": ["background", "spot"]}
    base["data"]["preprocessing"] |= {"size": [8, 8]}
    base["training"] |= {"loss": "dice-ce", "optimizer": "adam", "learning_rate": 0.01, "steps": None, "epochs": 1}
    return _study(base, changes)


def _study(base: dict[str, Any], changes: dict[str, Any]) -> Study:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict) and key not in ("model", "privacy", "strategy"):
            base[key] = {**base[key], **value}
        else:
            base[key] = value
    return Study.model_validate(base)


def site_data(study: Study, *, seed: int = 0, patients: int = 4, images: int = 2) -> SiteData:
    """Learnable pictures: brightness carries the class, a bright square is the mask. ``images`` for each patient."""
    draw = torch.Generator().manual_seed(seed)
    splits = {
        split: _pictures(study, draw, first, count * images, images)
        for split, first, count in (
            (Split.TRAIN, 0, patients),
            (Split.VALIDATION, patients, 2),
            (Split.TEST, patients + 2, 1),
        )
    }
    return SiteData(splits, report(splits))


def _pictures(study: Study, draw: torch.Generator, first: int, count: int, images: int) -> TensorSet:
    size = study.data.preprocessing.size
    pictures = torch.rand((count, 1, *size), generator=draw) * 0.3
    patients = first + torch.arange(count) // images
    if study.task.value == "segmentation":
        labels = torch.zeros((count, *size), dtype=torch.uint8)
        for row in range(count):
            top, left = torch.randint(0, size[0] - 3, (2,), generator=draw).tolist()
            labels[row, top : top + 3, left : left + 3] = 1
        return TensorSet(pictures + 0.7 * labels[:, None], labels, patients)
    yes = torch.arange(count) % 2
    pictures = pictures + 0.5 * yes[:, None, None, None]
    if study.data.multi_label:
        return TensorSet(pictures, torch.stack([1 - yes, yes], 1).float(), patients)
    return TensorSet(pictures, yes, patients)


def noise_data(seed: int, *, examples: int = 40) -> SiteData:
    """Pictures that say nothing of their class, two for each patient, so that scores rise and fall between rounds."""
    draw = torch.Generator().manual_seed(seed)
    splits = {}
    for split in Split:
        images = torch.randn((examples, 1, 4, 4), generator=draw)
        splits[split] = TensorSet(images, torch.randint(0, 2, (examples,), generator=draw), torch.arange(examples) // 2)
    return SiteData(splits, report(splits))


def report(splits: dict[Split, TensorSet]) -> DataReport:
    """The report of made-up data."""
    found = {
        "patients": sum(len(torch.unique(part.patients)) for part in splits.values()),
        "studies": 0,
        "series": 0,
        "labels": sum(len(part) for part in splits.values()),
        "cases": {split: len(part) for split, part in splits.items()},
        "examples": {split: len(part) for split, part in splits.items()},
        "spacing_mm": (),
        "intensity": None,
        "seconds": 0.0,
    }
    return DataReport(**{item.name: found.get(item.name, {}) for item in fields(DataReport)})  # all else: no counts
