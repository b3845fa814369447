"""How soon a killed process is back at work: kill -9, started again at once, until its next training is finished.

    python tests/benchmarks/bench_return.py [--kills 5]

Three sites and a coordinator as real processes over mutual TLS on loopback, two of three sites make a round, one
optimizer step a round on tiny images. A site is back when it has finished a training; a coordinator when a round that
it began after its start is complete. Imports, keys, connections, the study's offer and the data are all in it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from bench_rounds import STUDY

from medfl.shared.config import parse_settings
from medfl.shared.study import Study
from medfl.simulations.demo import (
    Places,
    read_rows,
    run_folder,
    set_up,
    site_metrics,
    start_client,
    start_server,
    write_images,
)
from medfl.simulations.processes import Processes

ROUNDS = 5000
LIMIT_S = 180.0


class Federation:
    """The processes, and what they have left so far."""

    def __init__(self, places: Places, study: Study, running: Processes) -> None:
        self._places, self._study, self._running = places, study, running
        self._server = start_server(places, running)
        self._clients = {name: start_client(places, name, running) for name in places.names}

    def rounds(self) -> int:
        """Complete rounds."""
        return len(read_rows(run_folder(self._places, self._study) / "metrics.jsonl"))

    def trainings(self, site: str) -> int:
        """Finished by one site."""
        return len(read_rows(site_metrics(self._places, site, self._study)))

    def kill_site(self, name: str) -> tuple[float, float]:
        """Seconds until its next training is finished, and of the processor in its process by then."""
        _kill(self._clients[name])
        before, began = self.trainings(name), time.monotonic()
        self._clients[name] = start_client(self._places, name, self._running)
        took = _until(lambda: self.trainings(name) > before, began)
        return took, _processor_s(self._clients[name].pid)

    def kill_coordinator(self) -> tuple[float, float]:
        """Seconds until its next round is complete, and of the processor in its process by then."""
        _kill(self._server)
        before, began = self.rounds(), time.monotonic()
        self._server = start_server(self._places, self._running)
        took = _until(lambda: self.rounds() > before, began)
        return took, _processor_s(self._server.pid)


def _processor_s(process: int) -> float:
    """User and system time of a running process (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _until(condition: Callable[[], bool], began: float) -> float:
    while not condition():
        if time.monotonic() > began + LIMIT_S:
            sys.exit(f"it did not happen within {LIMIT_S:.0f} s")
        time.sleep(0.02)
    return time.monotonic() - began


def main() -> None:
    """Print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="of the coordinator, and of a site")
    kills = parser.parse_args().kills
    text = STUDY.replace("MODE", "none").replace("ROUNDS", str(ROUNDS)).replace("minimum_sites: 3", "minimum_sites: 2")
    study = parse_settings(text, Study, name="bench.yaml")
    seconds: dict[str, list[tuple[float, float]]] = {"site": [], "coordinator": []}
    with tempfile.TemporaryDirectory() as folder, Processes() as running:
        places = Places(Path(folder), names=("north", "south", "east"))
        write_images(places, patients=8)
        set_up(places, study)
        federation = Federation(places, study, running)
        began = time.monotonic()
        print(f"three rounds {_until(lambda: federation.rounds() >= 3, began):.1f} s after the start", flush=True)
        for number in range(kills):
            seconds["site"].append(federation.kill_site(places.names[number % 3]))
            time.sleep(2)
            seconds["coordinator"].append(federation.kill_coordinator())
            time.sleep(2)
            took = ", ".join(f"{who} {values[-1][0]:.1f} s" for who, values in seconds.items())
            print(f"kill {number + 1} of {kills} each: {took}", flush=True)
    for who, both in seconds.items():
        took, processor = zip(*both, strict=True)
        spread = f"{min(took):.1f} to {max(took):.1f}, {kills} kills"
        busy = f"{statistics.median(processor):.1f} s of the processor"
        print(f"{who:12} back after {statistics.median(took):5.1f} s   ({spread}), {busy}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
