"""A founded consortium on disk, as its administrators would make it, and pictures for its sites."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medfl.server.founding import found
from medfl.shared.certificates import SiteFiles
from medfl.shared.enrolment import make_request
from medfl.shared.study import Study

SITES = ("north", "south", "west")


def found_consortium_folder(root: Path, *, sites: Sequence[str] = SITES) -> list[str]:
    """``root/fl`` is the coordinator's folder, ``root/NAME/keys`` each site's; returns what the command says."""
    for name in sites:
        make_request(root / name / "keys", name)
    requests = [root / name / "keys" / "request.json" for name in sites]
    said = list(found(root / "fl", requests, hosts=["127.0.0.1"], port=9443))
    for name in sites:
        files = SiteFiles(root / "fl" / "sites" / name)
        for certificate in (files.authority, files.certificate):
            shutil.copy(certificate, root / name / "keys")
    return said


def with_study(root: Path, study: Study) -> Path:
    """Name ``study`` in the coordinator's configuration; returns the configuration."""
    (root / "fl" / "study.json").write_bytes(study.canonical())
    config = root / "fl" / "consortium.yaml"
    config.write_text(config.read_text().replace("studies: []", "studies: [study.json]"))
    return config


def write_pictures(folder: Path, *, patients: int = 12, size: int = 8, seed: int = 0, masks: bool = True) -> Path:
    """A table of one grey picture a patient: a bright square on noise, and its mask or a class; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(patients):
        picture, mask = draw.integers(0, 60, (size, size)), np.zeros((size, size), np.uint8)
        top, left = draw.integers(0, size - 3, 2)
        mask[top : top + 3, left : left + 3] = 255
        bright = masks or number % 2
        picture = np.where((mask > 0) & bool(bright), 220, picture).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"p{number}.png")
        Image.fromarray(mask).save(folder / f"m{number}.png")
        label = {"mask": f"m{number}.png"} if masks else {"label": "yes" if bright else "no"}
        rows.append({"patient": f"P{number}", "image": f"p{number}.png", **label})
    table = folder / "sites.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table
