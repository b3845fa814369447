"""A founded consortium on disk, as its administrators would make it, and pictures for its sites."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medfl.client.config import SiteSettings
from medfl.client.joining import join
from medfl.client.trust import site_rosters
from medfl.server.config import load_consortium
from medfl.server.enrolling import Registrar
from medfl.server.founding import found
from medfl.shared.certificates import SiteFiles
from medfl.shared.enrolment import Invitation, make_keys, make_request
from medfl.shared.study import Study

SITES = ("north", "south", "west")


def found_consortium_folder(root: Path, *, sites: Sequence[str] = SITES, port: int = 9443) -> str:
    """``root/fl`` is the coordinator's folder, ``root/NAME`` each site's: enrolled, joined, all keys confirmed.

    Returns the consortium's fingerprint.
    """
    fingerprint = found(root / "fl", hosts=["127.0.0.1"], port=port)
    requests = [make_keys(root / name / "keys", name) for name in sites]
    registrar = Registrar(load_consortium(root / "fl" / "consortium.yaml"))
    for outcome in registrar.approve(requests):
        invitation = Invitation.read(outcome.invitation)
        site = site_settings(root, outcome.site)
        membership = invitation.check(make_request(SiteFiles(site.keys), outcome.site))
        join(invitation, membership, site, fingerprint=fingerprint)
        site_rosters(site).confirm(membership)
    return fingerprint


def site_settings(root: Path, name: str) -> SiteSettings:
    """Where a site of ``root`` keeps what."""
    home = root / name
    data = {"source": "table", "file": str(home / "pictures" / "sites.csv")}
    return SiteSettings.model_validate({"site": name, "keys": home / "keys", "state": home / "state", "data": data})


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
