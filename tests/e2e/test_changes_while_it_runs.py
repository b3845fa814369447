"""Real processes while a study runs: renewed, revoked, moved, expired, and disks that are full or read-only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from certified import load_authority
from command import Command
from consortium import found_consortium_folder, write_pictures
from cryptography import x509
from tiny import masks_study
from waiting import wait_for

from medfl.client.cli import main as client
from medfl.server.cli import main as server
from medfl.server.config import load_consortium
from medfl.server.rosters import RosterFolder
from medfl.shared.certificates import (
    SiteFiles,
    days_left,
    issue_client_certificate,
    load_certificate,
)
from medfl.shared.chain import inspect
from medfl.shared.enrolment import make_request
from medfl.shared.study import Study
from medfl.simulations.demo import free_port, read_rows

pytestmark = pytest.mark.e2e

STUDY = masks_study(
    data={"preprocessing": {"normalise": "scale_255", "size": [8, 8]}},
    rounds={"count": 5000, "minimum_sites": 1, "deadline_s": 60, "patience_s": 600, "evaluate_every": 5000},
)


class World:
    """A consortium on disk that runs one long study, and its processes."""

    def __init__(self, root: Path, sites: Sequence[str], study: Study = STUDY) -> None:
        self.root, self.study, self.sites = root, study, sites
        self.port = free_port()
        self.fingerprint = found_consortium_folder(root, sites=sites, port=self.port)
        self.config = root / "fl" / "consortium.yaml"
        (root / "fl" / "study.json").write_bytes(study.canonical())
        self.edit_config("studies: []", "studies: [study.json]")
        self.edit_config("host: 0.0.0.0", "host: 127.0.0.1")
        for number, name in enumerate(sites):
            write_pictures(root / name / "pictures", seed=number)
            self.site_file(name).write_text(
                f"site: {name}\nkeys: keys\nstate: state\nthreads: 1\ndevice: cpu\n"
                "data: {source: table, file: pictures/sites.csv}\n"
                "policy: {allow_no_privacy: true, require_secure_aggregation: false, "
                f"studies: ['{study.digest}']}}\n"
            )
        self.running: dict[str, Command] = {}

    def edit_config(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert text.count(old) == 1
        self.config.write_text(text.replace(old, new))

    def site_file(self, name: str) -> Path:
        return self.root / name / "site.yaml"

    def start(self, *names: str) -> None:
        for name in names:
            module, option, file = "medfl.client.cli", "--site", self.site_file
            if name == "fl":
                module, option, file = "medfl.server.cli", "--config", lambda _: self.config
            self.running[name] = Command(module, [option, str(file(name))], self.root / name / "log")

    def log(self, name: str) -> str:
        return (self.root / name / "log").read_text()

    @property
    def runs(self) -> Path:
        return self.root / "fl" / "runs" / f"{self.study.name}-{self.study.digest[:8]}"

    def rounds(self) -> list[dict[str, Any]]:
        return read_rows(self.runs / "metrics.jsonl")

    def next_round_of(self, *sites: str, seconds: float = 180) -> None:
        """Wait until exactly these have trained together, in a round that is complete only after this call."""
        before = len(self.rounds())

        def trained() -> bool:
            rows = self.rounds()[before + 1 :]
            return any({n for n, word in row["outcomes"].items() if word == "trained"} == set(sites) for row in rows)

        wait_for(trained, seconds)

    def short_certificate(self, site: str, seconds: float) -> None:
        """Put a certificate for the site's key on its disk that is valid for so long."""
        files = SiteFiles(self.root / site / "keys")
        request = make_request(files, site)
        authority = load_authority(self.root / "fl")
        files.certificate.write_bytes(issue_client_certificate(authority, site, request.tls_key, days=seconds / 86400))

    def certificate(self, site: str) -> x509.Certificate:
        return load_certificate(SiteFiles(self.root / site / "keys").certificate)


@contextmanager
def world(root: Path, sites: Sequence[str], study: Study = STUDY) -> Iterator[World]:
    made = World(root, sites, study)
    try:
        yield made
    finally:
        for command in made.running.values():
            command.kill()


@pytest.mark.timeout(600)
def test_certificates_are_renewed_a_site_is_revoked_and_the_coordinator_moves_while_rounds_go_on(
    tmp_path: Path,
) -> None:
    with world(tmp_path, ("north", "south", "west")) as it:
        it.start("fl", *it.sites)
        wait_for(it.rounds)
        it.running["west"].kill()
        it.short_certificate("west", 20)
        first = it.certificate("west")
        it.start("west")
        it.next_round_of("north", "south", "west")
        assert days_left(it.certificate("west")) > 300  # asked for and renewed by itself, over the open connection
        wait_for(lambda: days_left(first) < 0)
        it.next_round_of("north", "south", "west")

        assert server(["--config", str(it.config), "revoke", "south"]) == 0
        it.next_round_of("north", "west")
        assert it.running["south"].poll() is None, "the node stays, and says why it waits"
        wait_for(lambda: "expired or was revoked" in it.log("south") or "does not know this site" in it.log("south"))
        rows = inspect(tmp_path / "fl" / "state" / "audit.jsonl").rows
        assert [row["site"] for row in rows if row["event"] == "site revoked"] == ["south"]

        port = free_port()
        assert server(["--config", str(it.config), "renew", "--host", "127.0.0.1", "--port", str(port)]) == 0
        heard = re.compile(r"roster of epoch 4 is in force")
        wait_for(lambda: all(heard.search(it.log(name)) for name in ("north", "west")))
        assert it.running["fl"].stop() == 0
        it.edit_config(f"port: {it.port}", f"port: {port}")
        it.start("fl")
        it.next_round_of("north", "west")
        assert f"has moved from 127.0.0.1:{it.port} to 127.0.0.1:{port}" in it.log("north")
        assert [row["round"] for row in it.rounds()] == list(range(1, len(it.rounds()) + 1))


@pytest.mark.timeout(600)
def test_a_site_whose_certificate_expires_while_the_authority_is_offline_waits_and_is_back_with_a_new_one(
    tmp_path: Path,
) -> None:
    with world(tmp_path, ("north", "west")) as it:
        authority_key, safe = tmp_path / "fl" / "authority.key", tmp_path / "safe.key"
        it.start("fl", *it.sites)
        wait_for(it.rounds)
        it.running["north"].kill()
        it.short_certificate("north", 20)
        authority_key.rename(safe)  # kept elsewhere, as docs/coordinator.md advises
        it.start("north")
        it.next_round_of("north", "west")  # it trains with the certificate that is about to expire
        wait_for(lambda: days_left(it.certificate("north")) < 0)
        it.running["fl"].kill()  # whoever is connected stays so; a new connection needs a certificate that is valid
        it.start("fl")
        it.next_round_of("west")
        assert it.running["north"].poll() is None
        wait_for(lambda: "expired or was revoked" in it.log("north"))

        safe.rename(authority_key)
        request = tmp_path / "north" / "keys" / "request.json"
        fingerprint = make_request(SiteFiles(tmp_path / "north" / "keys"), "north").fingerprint
        assert server(["--config", str(it.config), "approve", str(request), "--fingerprint", fingerprint]) == 0
        roster = RosterFolder.of(load_consortium(it.config)).newest().fingerprint
        join = ["join", str(tmp_path / "fl" / "invitations" / "north.json"), "--fingerprint", it.fingerprint]
        assert client(["--site", str(it.site_file("north")), *join, "--roster", roster]) == 0
        it.next_round_of("north", "west")


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Mount a file system of that size on ``folder``, with what is in it; skip where that is not allowed."""
    aside = folder.with_name(f"{folder.name}.aside")
    if folder.exists():
        folder.rename(aside)
    folder.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system can only be mounted by root, and not in every container")
    try:
        if aside.exists():
            shutil.copytree(aside, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write until nothing fits any more; returns the file to remove."""
    path = folder / "fills-the-disk"
    with path.open("wb", buffering=0) as file:
        for size in (65536, 4096, 512, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return path


def read_only(folder: Path, *, yes: bool) -> None:
    subprocess.run(["mount", "-o", f"remount,{'ro' if yes else 'rw'}", str(folder)], check=True)


@pytest.mark.timeout(600)
def test_disks_that_are_full_or_come_up_read_only_stop_nobody_for_longer_than_that(tmp_path: Path) -> None:
    disks = {"north": tmp_path / "north" / "state", "fl": tmp_path / "fl" / "runs"}
    with world(tmp_path, ("north", "west")) as it, small_disk(disks["north"], 8), small_disk(disks["fl"], 8):
        it.start("fl", *it.sites)
        it.next_round_of("north", "west")
        full = fill(disks["north"])
        it.next_round_of("west")  # the site answers with a reason, or not at all; the others go on
        assert it.running["north"].poll() is None
        full.unlink()
        it.next_round_of("north", "west")
        assert {"disk full", "audit log unwritable"} & words_of(it.rounds(), "north")

        full = fill(disks["fl"])
        wait_for(lambda: "free space" in it.log("fl"))
        done = len(it.rounds())
        full.unlink()
        wait_for(lambda: len(it.rounds()) > done + 1)

        for name, disk in disks.items():
            assert it.running[name].stop() == 0
            read_only(disk, yes=True)
            it.start(name)
            wait_for(lambda name=name: it.running[name].poll() is not None)
            assert it.running[name].poll() in (1, 2, 3)
            assert "Read-only file system" in it.log(name)
            read_only(disk, yes=False)
            it.start(name)
            it.next_round_of("north", "west")

        codes = {name: command.stop() for name, command in it.running.items()}
        assert set(codes.values()) == {0}
        assert "Traceback" not in it.log("fl") + it.log("north")
        assert [row["round"] for row in it.rounds()] == list(range(1, len(it.rounds()) + 1))
        assert inspect(disks["north"] / "audit.jsonl").problem is None


def words_of(rows: list[dict[str, Any]], site: str) -> set[str]:
    return {row["outcomes"].get(site, "").partition(": ")[2] for row in rows}
