"""Five commands from nothing to a node that trains, given as their administrators would, over real processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from consortium import write_pictures
from tiny import masks_study
from waiting import wait_for

from medfl.simulations.demo import free_port, read_rows
from medfl.simulations.processes import Processes

pytestmark = pytest.mark.e2e

SITES = ("north", "south", "west")
STUDY = masks_study(
    data={"preprocessing": {"normalise": "scale_255", "size": [8, 8]}},
    rounds={"count": 2, "minimum_sites": 3, "deadline_s": 60, "patience_s": 120},
    secure_aggregation={"mode": "msa1"},
)


def command(module: str, *arguments: str | Path) -> str:
    """What a command says; the test fails when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fingerprints(text: str) -> list[str]:
    return re.findall(r"SHA256:[A-Za-z0-9+/]{43}", text)


def test_five_commands_lead_from_nothing_to_a_trained_round(tmp_path: Path) -> None:
    port, server, client = free_port(), "medfl.server.cli", "medfl.client.cli"
    config = tmp_path / "fl" / "consortium.yaml"

    said = command(server, "init", tmp_path / "fl", "--host", "127.0.0.1", "--port", str(port))
    (consortium,) = fingerprints(said)
    heard = {}
    for name in SITES:
        site = tmp_path / name / "site.yaml"
        (tmp_path / name).mkdir()
        said = command(client, "--site", site, "enroll", "--name", name, "--coordinator", f"127.0.0.1:{port}")
        (heard[name],) = fingerprints(said)
    requests = [tmp_path / name / "keys" / "request.json" for name in SITES]
    said = command(server, "--config", config, "approve", *requests, "--fingerprint", *heard.values())
    roster = fingerprints(said)[-1]
    for name in SITES:
        invitation = tmp_path / "fl" / "invitations" / f"{name}.json"
        join = ["join", invitation, "--fingerprint", consortium, "--roster", roster]
        said = command(client, "--site", tmp_path / name / "site.yaml", *join)
        assert set(fingerprints(said)) == {consortium, roster, *heard.values()}
        assert "[x] 4." in said

    # What each administrator decides for himself: where the images lie, and which study may train on them.
    for name in SITES:
        write_pictures(tmp_path / name / "pictures")
        site = tmp_path / name / "site.yaml"
        text = site.read_text().replace("source: dicom", "source: table")
        text = re.sub(r"folder: images.*", "file: pictures/sites.csv", text)
        text += f'  allow_no_privacy: true\n  studies: ["{STUDY.digest}"]\nthreads: 1\ndevice: cpu\n'
        site.write_text(text)
    (tmp_path / "fl" / "study.json").write_bytes(STUDY.canonical())
    text = (
        config.read_text().replace("studies: []", "studies: [study.json]").replace("when_done: stay", "when_done: exit")
    )
    config.write_text(text)

    with Processes() as running:
        coordinator = running.start("server", server, ["--config", str(config)], log=tmp_path / "fl" / "log")
        for name in SITES:
            site = tmp_path / name / "site.yaml"
            running.start(name, client, ["--site", str(site)], log=tmp_path / name / "log")
        wait_for(lambda: coordinator.poll() is not None or running.failed(), 480)
        logs = {name: (tmp_path / name / "log").read_text()[-2000:] for name in ("fl", *SITES)}
        assert coordinator.poll() == 0, logs
        codes = running.stop_all()
    assert set(codes.values()) == {0}

    folder = tmp_path / "fl" / "runs" / f"{STUDY.name}-{STUDY.digest[:8]}"
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["outcomes"] for row in rows] == [dict.fromkeys(SITES, "trained")] * 2
    assert json.loads((folder / "ending.json").read_text())["ending"] == "done"
    no_private_key_has_travelled(tmp_path)


def no_private_key_has_travelled(root: Path) -> None:
    """The middle line of every private key, or all of one that has no lines, is in no file of any other party."""
    for party in ("fl", *SITES):
        for key in (root / party).rglob("*.key"):
            content = key.read_bytes()
            secret = content.splitlines()[2] if b"PRIVATE" in content else content
            elsewhere = [path for other in ("fl", *SITES) if other != party for path in (root / other).rglob("*")]
            guilty = [path for path in elsewhere if path.is_file() and secret in path.read_bytes()]
            assert guilty == []
