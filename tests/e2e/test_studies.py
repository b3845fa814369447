"""Real processes: studies submitted, approved, stopped, resumed and withdrawn while coordinator and sites run."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Command
from consortium import found_consortium_folder, write_pictures
from tiny import masks_study
from waiting import wait_for

from medfl.client.cli import main as client
from medfl.server.cli import main as server
from medfl.shared.chain import inspect
from medfl.shared.study import Study

pytestmark = pytest.mark.e2e

SITES = ("north", "south")


def study(name: str, **changes: Any) -> Study:
    """Small pictures, as many short rounds as asked for."""
    rounds = {"count": 4, "minimum_sites": 2, "deadline_s": 120, "patience_s": 240, **changes.pop("rounds", {})}
    data = {"preprocessing": {"normalise": "scale_255", "size": [8, 8]}}
    return masks_study(name=name, data=data, rounds=rounds, **changes)


class World:
    """A consortium on disk and its processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.running: dict[str, Command] = {}
        found_consortium_folder(root, sites=SITES)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.config = root / "fl" / "consortium.yaml"
        self.config.write_text(self.config.read_text().replace("9443", str(port)))
        for name in SITES:
            write_pictures(root / name / "pictures", seed=len(name))
            (root / name / "site.yaml").write_text(
                f"site: {name}\ncoordinator: 127.0.0.1:{port}\nkeys: keys\nstate: state\nthreads: 1\ndevice: cpu\n"
                "data: {source: table, file: pictures/sites.csv}\n"
                "policy: {allow_no_privacy: true, require_secure_aggregation: false}\n"
            )

    def start_server(self) -> Command:
        arguments = ["--config", str(self.config)]
        self.running["server"] = Command("medfl.server.cli", arguments, self.root / "fl" / "server.log")
        return self.running["server"]

    def start_site(self, name: str) -> None:
        home = self.root / name
        self.running[name] = Command("medfl.client.cli", ["--site", str(home / "site.yaml")], home / "client.log")

    def stop_all(self) -> dict[str, int]:
        """Their exit statuses."""
        return {name: command.stop() for name, command in self.running.items()}

    def submit(self, study: Study) -> int:
        path = self.root / "fl" / f"{study.name}.json"
        path.write_bytes(study.canonical())
        return server(["--config", str(self.config), "submit", str(path)])

    def ask(self, *arguments: str) -> int:
        return server(["--config", str(self.config), *arguments])

    def at(self, site: str, *arguments: str) -> int:
        return client(["--site", str(self.root / site / "site.yaml"), *arguments])

    def offered(self, site: str, study: Study) -> bool:
        return (self.root / site / "state" / "studies" / study.digest / "offer.signed").exists()

    def approve(self, study: Study) -> None:
        for site in SITES:
            assert self.at(site, "approve", study.digest[:12], "--by", "Dr A. Example", "--ethics", "2027-12") == 0

    def rows(self, study: Study) -> list[dict[str, Any]]:
        path = self.folder(study) / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def folder(self, study: Study) -> Path:
        return self.root / "fl" / "runs" / f"{study.name}-{study.digest[:8]}"

    def ending(self, study: Study) -> str:
        path = self.folder(study) / "ending.json"
        return json.loads(path.read_text())["ending"] if path.exists() else ""

    def state(self, study: Study) -> str:
        path = self.root / "fl" / "state" / "studies" / study.digest / "record.json"
        return str(json.loads(path.read_text())["state"])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.stop_all()


@pytest.mark.timeout(1200)
def test_two_studies_one_after_the_other_and_a_third_that_a_site_leaves(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = study("first"), study("second", rounds={"count": 8})
    coordinator = world.start_server()
    for name in SITES:
        world.start_site(name)
    log = world.root / "fl" / "server.log"
    wait_for(lambda: log.exists() and "no study waits: sites are served" in log.read_text())

    # Submitted and approved while everything runs: training begins within seconds.
    assert world.submit(first) == 0
    kill_the_first_models_process(coordinator.pid)  # as a machine does whose memory ran out: it is made again
    wait_for(lambda: all(world.offered(site, first) for site in SITES))
    assert "was killed (signal 9)" in (world.root / "fl" / "server.log").read_text()
    wait_for(lambda: said(world, capsys, "status").count("does not take part: refused: study not approved") == 2)
    capsys.readouterr()
    assert world.at("north", "studies") == 0
    assert "waits for approval" in capsys.readouterr().out
    world.approve(first)
    wait_for(lambda: len(world.rows(first)) >= 1, 180)  # pauses between offers grow to minutes: a site joins anew
    assert world.submit(second) == 0
    listed = json.loads(said(world, capsys, "list", "--json"))
    assert [entry["study"] for entry in listed["studies"]] == ["first", "second"]
    assert listed["running"] is True

    # The next one has its turn by itself; stopped in the middle, it keeps its checkpoint.
    wait_for(lambda: world.state(first) == "ended")
    assert world.ending(first) == "done"
    wait_for(lambda: all(world.offered(site, second) for site in SITES))
    world.approve(second)
    wait_for(lambda: len(world.rows(second)) >= 2)
    assert world.ask("stop", "second") == 0
    wait_for(lambda: world.state(second) == "stopped", 180)
    done = len(world.rows(second))
    assert world.ending(second) == "stopped"
    assert 2 <= done < 8

    # Submitted while the coordinator is dead, between kill -9 and start; the stopped one goes on where it was.
    coordinator.kill()
    third = study("third", training={"steps": 500_000, "epochs": None})
    assert world.submit(third) == 0
    assert world.ask("resume", "second") == 0
    assert "does not run" in said(world, capsys, "list")
    coordinator = world.start_server()
    wait_for(lambda: world.state(second) == "ended")
    assert [row["round"] for row in world.rows(second)] == list(range(1, 9))
    assert world.rows(second)[done - 1]["round"] == done
    model = json.loads((world.folder(second) / "ending.json").read_text())["model"]

    # A training in progress is left at once.
    wait_for(lambda: all(world.offered(site, third) for site in SITES))
    world.approve(third)
    key = world.root / "north" / "state" / "studies" / first.digest / "cache.key"
    assert key.exists(), "the first study's images, which the others found in memory"
    log = world.root / "north" / "client.log"
    wait_for(lambda: said(world, capsys, "status", "third").count(" training") >= 1)
    capsys.readouterr()
    assert world.at("north", "withdraw", "third", "--by", "Dr A. Example") == 0
    assert "has trained no round" in capsys.readouterr().out
    # Said by the training, or by the gate where the request had not been opened yet: that knows the digest only.
    words = [f"study {what} was withdrawn here" for what in ("third", third.digest[:12])]
    wait_for(lambda: any(some in log.read_text() for some in words), 60)
    assert world.at("north", "withdraw", second.digest[:12], "--by", "Dr A. Example") == 0
    assert model in "".join(capsys.readouterr().out.split()), "the finished model, by the digest of its weights"
    assert world.at("north", "withdraw", "first", "--by", "Dr A. Example") == 0
    assert not key.exists()
    assert world.ask("stop", "third") == 0
    wait_for(lambda: world.state(third) == "stopped", 180)
    wait_for(lambda: "study third is over" in (world.root / "south" / "client.log").read_text(), 30)

    codes = world.stop_all()
    assert {name: codes[name] for name in SITES} == dict.fromkeys(SITES, 0)
    events = [row["event"] for row in inspect(world.root / "north" / "state" / "audit.jsonl").rows]
    assert events.count("study approved") == 3
    assert events.count("study withdrawn") == 3
    events = [row["event"] for row in inspect(world.root / "fl" / "state" / "audit.jsonl").rows if "by" in row]
    assert [event.removeprefix("study ") for event in events] == [
        *("submitted", "submitted", "told to stop", "submitted", "resumed", "told to stop"),
    ]


def kill_the_first_models_process(coordinator: int) -> None:
    def running() -> list[int]:
        children = Path(f"/proc/{coordinator}/task").glob("*/children")
        found = [int(child) for file in children for child in file.read_text().split()]
        return [pid for pid in found if b"algorithms.beginning" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    wait_for(running, 60)
    os.kill(running()[0], signal.SIGKILL)


def said(world: World, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command of the coordinator prints."""
    capsys.readouterr()
    assert world.ask(*arguments) == 0
    return capsys.readouterr().out
