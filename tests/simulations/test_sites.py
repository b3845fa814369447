"""Each virtual site's data as a simulation file asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.simulations.config import SimulationSettings
from medfl.simulations.sites import load_sites

STUDY = {
    "name": "shift",
    "task": "segmentation",
    "data": {
        "modality": "ct",
        "dimensions": 2,
        "classes": ["background", "lesion"],
        "label_map": {"Lesion": "lesion"},
        "preprocessing": {"spacing_mm": [8.0, 8.0], "normalise": "window", "window": [-50, 200], "size": [32, 32]},
    },
    "model": {"name": "unet", "channels": [4, 8], "norm": "group"},
    "training": {"loss": "dice-ce", "optimizer": "adam", "learning_rate": 1e-3, "batch_size": 8, "epochs": 1},
    "rounds": {"count": 1, "minimum_sites": 2},
    "privacy": {"mode": "none"},
    "secure_aggregation": {"mode": "none"},
    "strategy": {"name": "fedavg"},
}


def dealt(folder: Path, **partition: Any) -> dict[str, SiteData]:
    """Twelve phantom patients of one scanner, dealt to four sites."""
    site = {"name": "whole", "phantom": {"scanner": 0, "patients": 12, "split": {"validation": 0.5, "test": 0.0}}}
    settings = SimulationSettings.model_validate(
        {"study": STUDY, "sites": [site], "partition": {"sites": 4, **partition}, "output": folder}
    )
    return load_sites(settings, settings.study, torch.device("cpu"))


def test_scanners_of_a_partition_are_dealt_to_its_sites_in_turn(tmp_path: Path) -> None:
    plain, shifted = dealt(tmp_path), dealt(tmp_path, scanners=[{}, {"invert": True}])
    assert list(plain) == list(shifted) == ["site-1", "site-2", "site-3", "site-4"]
    for number, name in enumerate(plain):
        for split in (Split.TRAIN, Split.VALIDATION):
            before, after = plain[name].splits[split], shifted[name].splits[split]
            assert len(before)
            assert torch.equal(before.labels, after.labels)
            assert torch.equal(before.patients, after.patients)
            images = before.images.float()
            if number % 2:  # site-2 and site-4: each image upside down in its own range
                images = images.amax((2, 3), keepdim=True) + images.amin((2, 3), keepdim=True) - images
            torch.testing.assert_close(after.images.float(), images, atol=1e-5, rtol=0)
