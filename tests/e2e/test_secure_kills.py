"""Five real sites under secure aggregation, one of them killed in each phase of a sum: the sum stays the survivors'."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chaos import prepare
from command import Command
from numpy.typing import NDArray
from safetensors import safe_open
from tiny import masks_study
from waiting import wait_for

from medfl.shared.algorithms.travel import build_study_network, layouts
from medfl.shared.secagg.exchange import Phase
from medfl.shared.study import Study
from medfl.simulations.demo import Places, read_rows, run_folder

pytestmark = pytest.mark.e2e

STUDY = masks_study(
    name="kills",
    data={"preprocessing": {"normalise": "scale_255", "size": [16, 16]}},
    training={"learning_rate": 0.02, "epochs": 1},
    rounds={"count": 5, "minimum_sites": 3, "deadline_s": 60, "patience_s": 120, "evaluate_every": 5},
    secure_aggregation={"mode": "msa1", "phase_deadline_s": 20},
)
VICTIM = "fifth"


@pytest.fixture
def running() -> Iterator[dict[str, Command]]:
    commands: dict[str, Command] = {}
    yield commands
    for command in commands.values():
        command.stop()


@pytest.mark.timeout(300)
def test_the_sum_is_exactly_the_survivors_whichever_phase_a_site_is_killed_in(
    tmp_path: Path, running: dict[str, Command]
) -> None:
    places = prepare(tmp_path, [STUDY])
    home = places.coordinator
    config = str(home / "consortium.yaml")
    running["coordinator"] = Command("medfl.server.cli", ["--config", config], home / "medfl-server.log")
    others = tuple(name for name in places.names if name != VICTIM)
    for name in others:
        running[name] = client(places, name)
    network = build_study_network(STUDY)
    before = layouts(STUDY, network)[0].flatten(network.state_dict())

    phases = (*Phase, None)
    running[VICTIM] = client(places, VICTIM, dies_in=phases[0])
    for number, phase in enumerate(Phase, 1):
        wait_for(lambda: running[VICTIM].poll() is not None, 60)
        assert running[VICTIM].kill() == -signal.SIGKILL
        # The others are still in that phase: it waits for the dead one until it is back, or its deadline.
        updates = {name: kept_update(places, STUDY, name, number) for name in places.names}
        running[VICTIM] = client(places, VICTIM, dies_in=phases[number])
        row = wait_for_round(places, STUDY, number, running["coordinator"])
        survivors = [name for name, result in row["outcomes"].items() if result == "trained"]
        if phase in (Phase.ADVERTISE_KEYS, Phase.SHARE_KEYS):  # nothing of it can be in the sum
            assert set(survivors) == {*others}
        elif phase is not Phase.MASKED_INPUT:  # its vector had left; there it may have been back in time
            assert set(survivors) == {*places.names}
        after = checkpoint(places, STUDY, number)
        np.testing.assert_allclose(after - before, mean(updates, survivors), atol=2e-7)
        before = after
    wait_for(lambda: running["coordinator"].poll() is not None, 60)
    assert running["coordinator"].poll() == 0


def client(places: Places, name: str, *, dies_in: Phase | None = None) -> Command:
    home = places.hospital(name)
    arguments = ["--site", str(home / "site.yaml")]
    if dies_in is None:
        return Command("medfl.client.cli", arguments, home / "medfl-client.log")
    return Command("client_that_dies", [dies_in, *arguments], home / "medfl-client.log")


def wait_for_round(places: Places, study: Study, number: int, server: Command) -> dict[str, Any]:
    path = run_folder(places, study) / "metrics.jsonl"
    wait_for(lambda: len(read_rows(path)) >= number or server.poll() is not None, 120)
    row = read_rows(path)[number - 1]
    assert row["round"] == number
    return row


def checkpoint(places: Places, study: Study, number: int) -> NDArray[np.float32]:
    folder = run_folder(places, study)
    for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        with safe_open(folder / name, framework="numpy") as file:
            if json.loads(file.metadata()["medfl"])["round"] == number:
                return file.get_tensor("weights")
    raise AssertionError(f"no checkpoint of round {number}")


def kept_update(places: Places, study: Study, name: str, number: int) -> tuple[NDArray[np.float64], int]:
    """What this site kept of its own training, and its number of examples."""
    answer = places.hospital(name) / "state" / "studies" / study.digest / "answer.safetensors"
    with safe_open(answer, framework="numpy") as file:
        about = json.loads(file.metadata()["medfl"])
        assert about["asked"].startswith(f"{number}/")
        return file.get_tensor("update").astype(np.float64), about["examples"]


def mean(updates: dict[str, tuple[NDArray[np.float64], int]], sites: list[str]) -> NDArray[np.float64]:
    """Weighted mean of these sites' updates: the number a trusted party would compute."""
    total: Any = sum(update * examples for update, examples in (updates[name] for name in sites))
    mean: NDArray[np.float64] = total / sum(updates[name][1] for name in sites)
    return mean
