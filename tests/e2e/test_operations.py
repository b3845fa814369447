"""Node and coordinator as services: what systemd hears of the real processes, and what Prometheus reads."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import wait_for

from medfl.shared.config import parse_settings
from medfl.shared.study import Study
from medfl.simulations.demo import Places, free_port, set_up

pytestmark = pytest.mark.e2e

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
rounds: {count: 2, minimum_sites: 3}
privacy: {mode: none}
secure_aggregation: {mode: msa1}
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    made = Places(tmp_path_factory.mktemp("services"), names=("north", "south", "east"))
    for name in made.names:
        (made.hospital(name) / "dicom").mkdir(parents=True)
    set_up(made, parse_settings(STUDY, Study, name="small.yaml"))
    return made


@pytest.mark.parametrize("command", ["medfl-client", "medfl-server"])
def test_systemd_hears_ready_alive_and_stopping_and_prometheus_reads_figures(
    places: Places, tmp_path: Path, command: str
) -> None:
    node = command == "medfl-client"
    file = places.hospital("north") / "site.yaml" if node else places.coordinator / "consortium.yaml"
    metrics = free_port()
    configured = file.with_name("with-metrics.yaml")
    configured.write_text(file.read_text("utf-8") + f"metrics: {{port: {metrics}}}\n", "utf-8")
    module = "medfl.client.cli" if node else "medfl.server.cli"
    arguments = ["--site" if node else "--config", str(configured), "--log-file", str(tmp_path / "service.log")]
    with systemd(tmp_path) as heard, process(module, arguments, tmp_path) as running:
        wait_for(lambda: "READY=1" in heard())
        wait_for(lambda: heard().count("WATCHDOG=1") >= 2)
        figure = "medfl_online 0.0" if node else 'medfl_study_running{study="small"} 1.0'
        wait_for(lambda: figure in scraped(metrics))
        running.send_signal(signal.SIGTERM)
        wait_for(lambda: heard() and running.poll() is not None)
        assert heard()[-1] == "STOPPING=1"
    assert running.returncode == 0
    assert (tmp_path / "service.log").read_text("utf-8")


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text: str = answer.read().decode()
    return text


@contextmanager
def systemd(folder: Path) -> Iterator[Callable[[], list[str]]]:
    """A datagram socket in systemd's place; gives a function that returns all that was said so far."""
    said: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(folder / "notify"))
        receiver.setblocking(False)

        def heard() -> list[str]:
            while True:
                try:
                    said.append(receiver.recv(1000).decode())
                except BlockingIOError:
                    return said

        yield heard


@contextmanager
def process(module: str, arguments: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "600000"}
    with (folder / "output").open("wb") as output:
        running = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], env=environment, stdout=output, stderr=output
        )
    try:
        yield running
    finally:
        if running.poll() is None:
            running.kill()
        running.wait()
