"""Hospitals whose site files point at a running PACS train together, with DICOM SEG labels; all real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from command import Command
from orthanc import Pacs, alone
from safetensors.numpy import load_file

from medfl.shared.config import parse_settings
from medfl.shared.study import Study
from medfl.simulations.demo import (
    Places,
    free_port,
    read_rows,
    run_folder,
    set_up,
    write_images,
)

pytestmark = pytest.mark.e2e

STUDY = """
name: from-pacs
task: segmentation
data:
  modality: ct
  dimensions: 2
  classes: [background, lesion]
  preprocessing: {normalise: window, window: [-60, 200], size: [32, 32], fit: resize, slices: {per_case: 4}}
model: {name: unet, channels: [4, 8], residual_units: 0}
training: {loss: dice-ce, epochs: 1, batch_size: 8}
rounds: {count: 2, minimum_sites: 3, deadline_s: 120, patience_s: 120}
privacy: {mode: none}
secure_aggregation: {mode: none}
"""

WEB = """  source: dicomweb
  url: {url}/dicom-web
  user: reader
  password: file:pacs-password
"""
GET = """  source: dimse
  host: 127.0.0.1
  pacs_port: {dicom}
  called_ae_title: ORTHANC
"""
MOVE = GET + "  retrieve: move\n  port: {move}\n"
COMMON = "  query: {{modality: CT}}\n  fetch: {{folder: from-pacs, instances_per_minute: 100000}}\n"


@pytest.fixture
def archives(tmp_path: Path) -> Iterator[dict[str, Pacs]]:
    if not alone():
        pytest.skip("needs a namespace with loopback only: see test_in_namespace.py, which makes one")
    out = {}
    for name in ("north", "south", "east"):
        (tmp_path / "pacs" / name).mkdir(parents=True)
        out[name] = Pacs(tmp_path / "pacs" / name, free_port(), free_port(), free_port())
    try:
        for pacs in out.values():
            pacs.start()
        yield out
    finally:
        for pacs in out.values():
            pacs.stop()


@pytest.mark.timeout(560)
def test_three_hospitals_train_from_their_archives_each_in_its_own_way(
    tmp_path: Path, archives: dict[str, Pacs]
) -> None:
    places = Places(tmp_path, names=tuple(archives))
    write_images(places, patients=8)
    study = parse_settings(STUDY, Study, name="from-pacs.yaml")
    set_up(places, study)
    for (name, pacs), way in zip(archives.items(), (WEB, GET, MOVE), strict=True):
        home = places.hospital(name)
        images = home / "dicom"
        pacs.upload([path for path in sorted(images.rglob("*")) if path.is_file()])
        images.rename(tmp_path / f"gone-{name}")  # from here on only the archive has them
        (home / "pacs-password").write_text("right")
        (home / "pacs-password").chmod(0o600)
        site = home / "site.yaml"
        data = (way + COMMON).format(url=pacs.url, dicom=pacs.dicom, move=pacs.move_port)
        site.write_text(site.read_text().replace("  source: dicom\n  folder: dicom\n", data))
    running = []
    for name in archives:
        file, log = places.hospital(name) / "site.yaml", tmp_path / f"{name}.log"
        running.append(Command("medfl.client.cli", ["--site", str(file)], log))
    config, log = places.coordinator / "consortium.yaml", tmp_path / "server.log"
    running.append(Command("medfl.server.cli", ["--config", str(config)], log))
    try:
        assert running[-1].wait(480) == 0, log.read_text()[-2000:]
    finally:
        codes = [command.stop() for command in running]
    assert codes == [0] * 4
    rows = read_rows(run_folder(places, study) / "metrics.jsonl")
    assert [row["outcomes"] for row in rows] == [dict.fromkeys(archives, "trained")] * 2
    ending = json.loads((run_folder(places, study) / "ending.json").read_text())
    assert ending["ending"] == "done"
    assert load_file(run_folder(places, study) / "model.safetensors")
    for name, pacs in archives.items():
        here = [p for p in (places.hospital(name) / "from-pacs").rglob("*") if p.is_file() and p.name[0] != "."]
        there = requests.get(pacs.url + "/statistics", auth=("reader", "right"), timeout=10).json()
        assert len(here) == there["CountInstances"] > 8
        assert all(path.stat().st_mode & 0o077 == 0 for path in here)
