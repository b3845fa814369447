"""Five real sites under secure aggregation, one of them killed in each phase of a sum: the sum stays the survivors'."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from waiting import wait_for

from medfl.shared.algorithms.travel import build_study_network, layouts
from medfl.shared.config import parse_settings
from medfl.shared.study import Study
from medfl.simulations.demo import Places, read_rows, run_folder, set_up, start_client, start_server, write_images
from medfl.simulations.processes import Processes

pytestmark = pytest.mark.e2e

STUDY = """
name: kills
task: segmentation
data:
  modality: ct
  dimensions: 2
  classes: [background, lesion]
  label_map: {Lesion: lesion}
  preprocessing: {normalise: window, window: [-60, 200], size: [16, 16], fit: resize, slices: {per_case: 2}}
model: {name: unet, channels: [4, 8], residual_units: 0}
training: {loss: dice-ce, steps: 1, batch_size: 8}
rounds: {count: 5, minimum_sites: 3, deadline_s: 60, patience_s: 120, evaluate_every: 5}
privacy: {mode: none}
secure_aggregation: {mode: msa1, phase_deadline_s: 20}
"""
VICTIM = "fifth"


@pytest.fixture
def running() -> Iterator[Processes]:
    with Processes() as processes:
        yield processes


@pytest.mark.timeout(600)
def test_the_sum_is_exactly_the_survivors_whichever_phase_a_site_is_killed_in(
    tmp_path: Path, running: Processes
) -> None:
    places = Places(tmp_path, names=("first", "second", "third", "fourth", VICTIM))
    study = parse_settings(STUDY, Study, name="kills.yaml")
    write_images(places, patients=8)
    set_up(places, study)
    server = start_server(places, running)
    clients = {name: start_client(places, name, running) for name in places.names}
    network = build_study_network(study)
    before = layouts(study, network)[0].flatten(network.state_dict())

    phases_of_victim = []
    for number in range(1, 6):
        # In round n the victim dies when it has answered n - 1 of the five phases that follow its training.
        wait_for(lambda number=number: phases_after_training(places, number) >= number - 1, 120)
        clients[VICTIM].kill()
        clients[VICTIM].wait()
        phases_of_victim.append(phases_after_training(places, number))
        clients[VICTIM] = start_client(places, VICTIM, running)
        row = wait_for_round(places, study, number, server)
        after = checkpoint(places, study, number)
        survivors = [name for name, result in row["outcomes"].items() if result == "trained"]
        assert set(survivors) >= set(places.names) - {VICTIM}
        np.testing.assert_allclose(after - before, mean_update(places, study, survivors, number), atol=2e-7)
        before = after
    assert server.wait(60) == 0
    assert sorted(phases_of_victim) == phases_of_victim


def phases_after_training(places: Places, number: int) -> int:
    """How many phases the victim has answered since it trained round ``number``; -1 before."""
    log = places.hospital(VICTIM) / "medfl-client.log"
    lines = log.read_text().splitlines() if log.exists() else []
    trained = [index for index, line in enumerate(lines) if f"round {number}/5 train:" in line]
    if not trained or not any("train answered" in line for line in lines[trained[-1] :]):
        return -1
    return sum("query.phase answered" in line for line in lines[trained[-1] :])


def wait_for_round(places: Places, study: Study, number: int, server: subprocess.Popen[bytes]) -> dict[str, Any]:
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


def mean_update(places: Places, study: Study, sites: list[str], number: int) -> NDArray[np.float64]:
    """Weighted mean of what these sites kept of their own training: the number a trusted party would compute."""
    total, weight = 0.0, 0
    for name in sites:
        answer = places.hospital(name) / "state" / "studies" / study.digest / "answer.safetensors"
        with safe_open(answer, framework="numpy") as file:
            about = json.loads(file.metadata()["medfl"])
            assert about["asked"].startswith(f"{number}/")
            total = total + file.get_tensor("update").astype(np.float64) * about["examples"]
            weight += about["examples"]
    return total / weight
