"""Real processes over loopback: a federation that finishes although a site is killed and the coordinator too."""

from __future__ import annotations

import base64
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from command import Command, said
from safetensors.numpy import load_file
from waiting import wait_for

from medfl.shared.chain import inspect
from medfl.shared.config import parse_settings
from medfl.shared.study import Study
from medfl.simulations.demo import (
    Places,
    read_rows,
    run_folder,
    set_up,
    site_metrics,
    start_client,
    write_images,
)
from medfl.simulations.processes import Processes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STUDY = """
name: small
task: segmentation
data:
  modality: ct
  dimensions: 2
  classes: [background, lesion]
  label_map: {Lesion: lesion}
  preprocessing: {normalise: window, window: [-60, 200], size: [32, 32], fit: resize, slices: {per_case: 4}}
model: {name: unet, channels: [4, 8], residual_units: 0}
training: {loss: dice-ce, epochs: 1, batch_size: 8}
rounds: {count: 4, minimum_sites: 3, deadline_s: 60, patience_s: 60}
privacy: {mode: none}
secure_aggregation: {mode: MODE}
"""


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Places:
    places = Places(tmp_path_factory.mktemp("federation"), names=("north", "south", "east", "west"))
    write_images(places, patients=8)
    return places


@pytest.fixture
def study() -> Study:
    return small_study("none")


def small_study(mode: str) -> Study:
    return parse_settings(STUDY.replace("MODE", mode), Study, name="small.yaml")


@pytest.fixture
def running() -> Iterator[dict[str, Command]]:
    processes: dict[str, Command] = {}
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("mode", ["none", "msa1"])
def test_a_study_finishes_although_a_site_and_the_coordinator_are_killed(
    tmp_path: Path, hospitals: Places, running: dict[str, Command], mode: str
) -> None:
    study, hospitals = small_study(mode), with_the_same_images(tmp_path, hospitals)
    set_up(hospitals, study)

    def start(name: str) -> None:
        home, option = hospitals.hospital(name), "--site"
        module, file, log = "medfl.client.cli", home / "site.yaml", home / "medfl-client.log"
        if name == "server":
            home, option = hospitals.coordinator, "--config"
            module, file, log = "medfl.server.cli", home / "consortium.yaml", home / "medfl-server.log"
        running[name] = Command(module, [option, str(file)], log)

    for name in hospitals.names:
        start(name)
    logs = [hospitals.hospital(name) / "medfl-client.log" for name in hospitals.names]
    wait_for(lambda: all(log.exists() and "not reachable" in log.read_text() for log in logs))
    start("server")  # all four dial it within seconds, and are in the first round
    metrics = run_folder(hospitals, study) / "metrics.jsonl"

    wait_for(lambda: len(read_rows(metrics)) >= 1)
    running["east"].kill()
    start("east")
    wait_for(lambda: len(read_rows(metrics)) >= 2)
    running["server"].kill()
    start("server")

    assert running["server"].wait(300) == 0
    rows = read_rows(metrics)
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["outcomes"] == dict.fromkeys(hospitals.names, "trained")
    assert "trained" in {row["outcomes"].get("east") for row in rows[1:]}, "a killed site is back"
    ending = json.loads((run_folder(hospitals, study) / "ending.json").read_text())
    assert len(ending.pop("model")) == 64
    assert ending == {"ending": "done", "round": 4, "study": study.digest, "model_of_round": 4}
    assert load_file(run_folder(hospitals, study) / "model.safetensors")
    assert {name: running[name].stop() for name in hospitals.names} == dict.fromkeys(hospitals.names, 0)

    assert_nothing_of_a_patient_was_written(hospitals)
    assert_both_sides_tell_the_same(hospitals)
    assert rows[-1]["site_scores"] == {}, "no policy releases site metrics here"
    assert read_rows(site_metrics(hospitals, "north", study))[-1]["scores"]["loss"] > 0


def test_check_tells_what_is_wrong_by_its_exit_status(hospitals: Places, study: Study) -> None:
    if not (hospitals.hospital("north") / "site.yaml").exists():
        set_up(hospitals, study)
    site = hospitals.hospital("north") / "site.yaml"
    study_file = hospitals.coordinator / "study.json"

    status, words = said("medfl.client.cli", "--site", site, "--check")
    assert (status, "not reachable" in words) == (5, True)
    status, words = said("medfl.server.cli", "--config", hospitals.coordinator / "consortium.yaml", "--check")
    assert (status, study.digest in words) == (0, True)

    other = site.with_name("other.yaml")
    other.write_text(site.read_text().replace("policy:", "policy:\n  expires: 2026-01-01"))
    status, words = said("medfl.client.cli", "--site", other, "--check", "--study", study_file)
    assert (status, "policy expired" in words) == (3, True)
    other.write_text(site.read_text().replace("folder: dicom", "folder: nowhere"))
    assert said("medfl.client.cli", "--site", other, "--check", "--study", study_file)[0] == 4
    other.write_text(site.read_text().replace("policy:", "polcy:"))
    status, words = said("medfl.client.cli", "--site", other, "--check")
    assert (status, "did you mean 'policy'?" in words) == (2, True)


def with_the_same_images(root: Path, hospitals: Places) -> Places:
    """The same hospitals before they enrolled: drawing patients takes longest."""
    fresh = Places(root, names=hospitals.names)
    for name in hospitals.names:
        fresh.hospital(name).mkdir(parents=True)
        (fresh.hospital(name) / "dicom").symlink_to(hospitals.hospital(name) / "dicom")
    return fresh


def assert_nothing_of_a_patient_was_written(places: Places) -> None:
    """No file of either side, outside the image folders, holds a phantom's name, number or unique identifier."""
    for name in places.names:  # what is searched for is what the images have
        image = next(path for path in (places.hospital(name) / "dicom").resolve().rglob("*") if path.is_file())
        header = pydicom.dcmread(image, stop_before_pixels=True)
        for value in (header.PatientName, header.PatientID, header.StudyInstanceUID, header.SOPInstanceUID):
            assert TRACES.search(str(value).encode())
    written = [path for path in places.root.rglob("*") if path.is_file() and "dicom" not in path.parts]
    names = {path.name for path in written}
    assert {"audit.jsonl", "heads.json", "fleet.db", "server.log", "metrics.jsonl", "medfl-client.log"} <= names
    assert len(written) > 20
    guilty = [path for path in written if TRACES.search(path.read_bytes()) or TRACES.search(path.name.encode())]
    assert guilty == []


def forms(text: bytes) -> list[bytes]:
    """``text`` as it might be written: as it is, in UTF-16, as hexadecimal digits, and within base64."""
    shifted = [base64.b64encode(b"x" * shift + text).rstrip(b"=")[:-1] for shift in (0, 1, 2)]
    within = [form[4 if shift else 0 :] for shift, form in enumerate(shifted)]
    return [text, text.decode().encode("utf-16-le"), text.hex().encode(), text.hex().upper().encode(), *within]


TRACES = re.compile(b"|".join([*map(re.escape, forms(b"PHANTOM-")), rb"2\.25\.[0-9]{10}"]))


@pytest.mark.parametrize("value", [b"PHANTOM-1-042", b"PHANTOM^PHANTOM-1-042", b"x2.25.12345678901234567890"])
def test_the_search_for_patients_would_find_what_is_there(value: bytes) -> None:
    assert TRACES.search(b"log: " + value + b" trained")
    if b"PHANTOM" in value:
        assert TRACES.search(value.decode().encode("utf-16-le"))
        assert TRACES.search(json.dumps({"id": value.hex()}).encode())
        for before in (b"", b"a", b"ab", b"abc"):
            assert TRACES.search(base64.b64encode(before + value + b" trained"))
    assert not TRACES.search(b"a phantom, round 2, 25.0 s")


def assert_both_sides_tell_the_same(places: Places) -> None:
    """Both audit logs hold together; what one side sent stands in the other's, and the sites hold good receipts."""
    coordinator = inspect(places.coordinator / "state" / "audit.jsonl")
    assert coordinator.problem is None
    seen = [row for row in coordinator.rows if row["event"] == "head seen"]
    for name in places.names:
        site = inspect(places.hospital(name) / "state" / "audit.jsonl")
        assert site.problem is None
        for one, other in (("in", "out"), ("out", "in")):
            here = {row["sha256"] for row in site.rows if row["event"] == one and "sha256" in row}
            there = {row["sha256"] for row in coordinator.rows
                     if row["event"] == other and row["site"] == name and "sha256" in row}  # fmt: skip
            # What was on its way when a process was killed stands on one side only.
            taken, sent = (here, there) if one == "in" else (there, here)
            assert taken <= sent
            assert len(sent - taken) <= 6
        status, words = said("medfl.client.cli", "--site", places.hospital(name) / "site.yaml", "audit", "verify")
        assert status == 0, words
        if [row["site"] for row in seen].count(name) > 1:  # the receipt comes with the next round's question
            assert "was countersigned by demo at" in words
    assert {row["site"] for row in seen} == set(places.names)
    assert {row["receipt"] for row in seen} == {"signed"}


def test_a_client_stops_within_seconds_of_sigterm(hospitals: Places, study: Study) -> None:
    if not (hospitals.hospital("south") / "site.yaml").exists():
        set_up(hospitals, study)
    log = hospitals.hospital("south") / "medfl-client.log"
    earlier = log.stat().st_size if log.exists() else 0
    with Processes() as running:
        client = start_client(hospitals, "south", running)
        wait_for(lambda: log.exists() and b"not reachable" in log.read_bytes()[earlier:])
        client.send_signal(signal.SIGTERM)
        assert client.wait(60) == 0
