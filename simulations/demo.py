"""``medfl-sim demo``: four hospitals that do not exist, as real processes over mutual TLS, and what they gained."""

from __future__ import annotations

import importlib.resources
import json
import multiprocessing
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from medfl.client.config import load_site
from medfl.client.decisions import Approval, approve
from medfl.client.joining import join, read_invitation
from medfl.client.trust import site_rosters
from medfl.server.config import load_consortium
from medfl.server.enrolling import Registrar
from medfl.server.founding import found
from medfl.shared.config import load_settings, parse_settings
from medfl.shared.enrolment import make_keys
from medfl.shared.errors import MedFLError
from medfl.shared.files import private_folder
from medfl.shared.study import Study
from medfl.simulations.processes import Processes

HOSPITALS = ("north", "south", "east", "west")
PATIENTS = 12
SEED = 2026

_SMALL = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONUNBUFFERED": "1"}
"""One thread for arithmetic, and not a heap for each of the others: five processes share a small machine."""


@dataclass(frozen=True)
class Places:
    """Where the demonstration keeps what; each hospital's folder stands for a machine of its own."""

    root: Path
    names: tuple[str, ...] = HOSPITALS

    @property
    def coordinator(self) -> Path:
        """The coordinator's machine."""
        return self.root / "coordinator"

    def hospital(self, name: str) -> Path:
        """One hospital's machine."""
        return self.root / "hospitals" / name


def run_demo(output: Path, *, console: Console | None = None) -> int:
    """Run the whole demonstration in ``output`` (emptied first) and print the table; returns the exit status."""
    console = console or Console()
    began = time.monotonic()
    study = parse_settings(
        (importlib.resources.files("medfl.configs") / "demo_study.yaml").read_text("utf-8"),
        Study,
        name="demo_study.yaml",
    )
    places = Places(output.resolve())
    _clear(places.root)
    console.print(f"1. {len(places.names)} hospitals, {PATIENTS} patients each: DICOM CT series and SEG labels")
    with console.status("drawing patients"):
        write_images(places, patients=PATIENTS)
    console.print("2. keys, certificates, the consortium, and each site's approval of the study")
    port = set_up(places, study)
    console.print(f"3. medfl-server and {len(places.names)} medfl-client processes on port {port}")
    _federate(places, study, console)
    console.print("4. what each hospital reaches alone with the same budget, and without a network")
    rows = _compare(places, study, console)
    _print(rows, console)
    folder = run_folder(places, study)
    console.print(f"model, study, metrics and logs: {folder}")
    console.print(f"{time.monotonic() - began:.0f} s in all")
    return 0


def run_folder(places: Places, study: Study) -> Path:
    """What the coordinator leaves of the study."""
    return places.coordinator / "runs" / f"{study.name}-{study.digest[:8]}"


def set_up(places: Places, study: Study) -> int:
    """Enrol all hospitals as their administrators would, write every configuration; returns the coordinator's port."""
    port = free_port()
    consortium = found(places.coordinator, hosts=["127.0.0.1", "localhost"], port=port, listen="127.0.0.1", name="demo")
    (places.coordinator / "study.json").write_bytes(study.canonical())  # JSON is YAML
    config = places.coordinator / "consortium.yaml"
    text = config.read_text("utf-8").replace("studies: []", "studies: [study.json]")
    config.write_text(text.replace("when_done: stay", "when_done: exit"), "utf-8")
    for name in places.names:
        home = private_folder(places.hospital(name))
        (home / "site.yaml").write_text(
            f"site: {name}\n"
            "keys: keys\nstate: state\nthreads: 1\n"
            "data:\n"
            "  source: dicom\n"
            "  folder: dicom\n"
            "  split: {validation: 0.25, test: 0, min_patients: 8}\n"
            "policy:\n"
            "  allow_no_privacy: true\n"
            f"  require_secure_aggregation: {str(study.secure_aggregation.mode != 'none').lower()}\n",
            "utf-8",
        )
    requests = [make_keys(places.hospital(name) / "keys", name) for name in places.names]
    registrar = Registrar(load_consortium(config))
    with registrar.alone():
        invitations = {outcome.site: outcome.invitation for outcome in registrar.approve(requests)}
    for name in places.names:
        settings = load_site(places.hospital(name) / "site.yaml")
        invitation, membership = read_invitation(invitations[name], settings)
        join(invitation, membership, settings, fingerprint=consortium)  # after a telephone call
        site_rosters(settings).confirm(membership)  # after a call to each of the others
        approve(settings, Approval(study=study.digest, by="the demonstration"))  # after reading it
    return port


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now, and that the system gives to nobody who dials out."""
    while True:
        port = random.randrange(20_000, 32_000)  # Linux dials from 32768 on, other systems from 49152 on
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _clear(root: Path) -> None:
    marker = root / ".medfl-demo"
    if root.exists() and any(root.iterdir()):
        if not marker.exists():
            raise MedFLError(f"{root} is not empty and not a demonstration's folder: choose another with --output")
        shutil.rmtree(root)
    private_folder(root)
    marker.touch()


def write_images(places: Places, *, patients: int) -> None:
    """Give every hospital its own scanner's DICOM series and SEG labels."""
    with _two_helpers() as pool:
        jobs = [
            pool.submit(_one_hospital, private_folder(places.hospital(name)) / "dicom", index, patients)
            for index, name in enumerate(places.names)
        ]
        for job in jobs:
            job.result()


@contextmanager
def _two_helpers() -> Iterator[ProcessPoolExecutor]:
    """Processes that import what is large, so that this one, which outlives them, does not."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def _one_hospital(folder: Path, index: int, patients: int) -> None:
    from medfl.simulations.phantoms import write_hospital

    write_hospital(folder, index, patients, SEED)


def _federate(places: Places, study: Study, console: Console) -> None:
    with Processes() as running:
        server = start_server(places, running)
        for name in places.names:
            start_client(places, name, running)
        watch = _Watch(places, study)
        with Live(console=console, refresh_per_second=4, get_renderable=watch.render, transient=False):
            while server.poll() is None:
                if failed := running.failed():
                    raise MedFLError(f"{', '.join(failed)} ended early: see the logs below {places.root}")
                time.sleep(0.2)
            watch.read()
        console.print()
        codes = running.stop_all()
    if any(codes.values()):
        wrong = ", ".join(f"{name} (status {code})" for name, code in codes.items() if code)
        raise MedFLError(f"{wrong} did not end well: see the logs below {places.root}")


def start_server(places: Places, running: Processes) -> subprocess.Popen[bytes]:
    """``medfl-server --config consortium.yaml`` as a process, its output in medfl-server.log."""
    return running.start(
        "medfl-server",
        "medfl.server.cli",
        ["--config", str(places.coordinator / "consortium.yaml")],
        log=places.coordinator / "medfl-server.log",
        environment=_SMALL,
    )


def start_client(places: Places, name: str, running: Processes) -> subprocess.Popen[bytes]:
    """``medfl-client --site site.yaml`` of one hospital as a process, its output in medfl-client.log."""
    home = places.hospital(name)
    return running.start(
        name,
        "medfl.client.cli",
        ["--site", str(home / "site.yaml")],
        log=home / "medfl-client.log",
        environment=_SMALL,
    )


class _Watch:
    """Reads the coordinator's and the hospitals' own metrics files while they grow."""

    def __init__(self, places: Places, study: Study) -> None:
        self._study = study
        self._server = run_folder(places, study) / "metrics.jsonl"
        self._sites = {name: site_metrics(places, name, study) for name in places.names}
        self._rows: list[dict[str, Any]] = []
        self._last: dict[str, dict[str, dict[str, Any]]] = {}
        self._began = time.monotonic()

    def read(self) -> None:
        """Take in what is new."""
        self._rows = read_rows(self._server)
        for name, path in self._sites.items():
            self._last[name] = {row["set"]: row for row in read_rows(path)}

    def render(self) -> Group:
        """Round, time left, and each site's last loss and Dice."""
        self.read()
        done, total = len(self._rows), self._study.rounds.count
        seconds = sum(row["seconds"] for row in self._rows)
        left = f"{seconds / done * (total - done):.0f} s left" if done else "sites are reading their images"
        head = Table.grid(padding=(0, 2))
        head.add_row(ProgressBar(total=total, completed=done, width=24), f"round {done}/{total}", left)
        table = Table(box=None, padding=(0, 3, 0, 0))
        for title in ("site", "training loss", "held-out dice", "now"):
            table.add_column(title)
        for name, last in self._last.items():
            train, held_out = last.get("train"), last.get("validation")
            state = "round trained" if train and train["round"] > done else "training" if done < total else "done"
            table.add_row(
                name,
                f"{train['scores']['loss']:.3f}" if train else "",
                f"{held_out['scores'].get('dice', float('nan')):.3f}" if held_out else "",
                state,
            )
        return Group(head, table)


def site_metrics(places: Places, name: str, study: Study) -> Path:
    """A hospital's own record of its scores; they are in no message."""
    return places.hospital(name) / "state" / "studies" / study.digest / "metrics.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a metrics file; none where it does not exist yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]


@dataclass(frozen=True)
class ComparisonRow:
    """What one hospital's held-out patients score."""

    site: str
    federated: float
    alone: float
    threshold: float
    mean_mask: float


def _compare(places: Places, study: Study, console: Console) -> list[ComparisonRow]:
    with console.status("training each hospital alone"), _two_helpers() as pool:
        jobs = {name: pool.submit(_one_alone, places.hospital(name) / "site.yaml", study) for name in places.names}
        results = {name: job.result() for name, job in jobs.items()}
    rows = []
    for name in places.names:
        last = [row for row in read_rows(site_metrics(places, name, study)) if row["set"] == "validation"][-1]
        rows.append(ComparisonRow(name, last["scores"]["dice"], *results[name]))
    return rows


def _one_alone(site_file: Path, study: Study) -> tuple[float, float, float]:
    """Dice of local training, best threshold and mean mask, on the very split the site used in the federation."""
    import torch

    from medfl.client.config import SiteSettings
    from medfl.client.data.splits import Split
    from medfl.client.runtime import load_data
    from medfl.shared.logs import quiet_libraries
    from medfl.simulations.baselines import alone_and_ensemble, best_threshold, mean_mask

    quiet_libraries()
    torch.set_num_threads(1)
    settings = load_settings(site_file, SiteSettings)
    data = load_data(settings, study, torch.device("cpu"))
    parts = data.splits[Split.TRAIN], data.splits[Split.VALIDATION]
    dice = alone_and_ensemble(study, {settings.site: data}, device=torch.device("cpu"))[0].scores[settings.site]
    return dice, best_threshold(*parts, 2), mean_mask(*parts, 2)


def _print(rows: list[ComparisonRow], console: Console) -> None:
    from medfl.simulations.phantoms import SCANNERS

    table = Table(title="Dice on each hospital's held-out patients", title_justify="left")
    for title in ("site", "scanner", "federated", "alone", "best threshold", "mean mask"):
        table.add_column(title, justify="left" if title in ("site", "scanner") else "right")
    for index, row in enumerate(rows):
        values = (row.federated, row.alone, row.threshold, row.mean_mask)
        table.add_row(row.site, SCANNERS[index].model, *(f"{value:.3f}" for value in values))
    count = len(rows)
    means = [
        sum(getattr(row, what) for row in rows) / count for what in ("federated", "alone", "threshold", "mean_mask")
    ]
    table.add_section()
    table.add_row("mean", "", *(f"[bold]{value:.3f}[/bold]" for value in means))
    console.print(table)
