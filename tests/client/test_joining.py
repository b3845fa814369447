"""Joining: what was heard by telephone decides, and a swapped invitation installs nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from consortium import found_consortium_folder, site_settings

from medfl.client.cli import main
from medfl.client.pin import joined, load_pin
from medfl.client.trust import site_rosters
from medfl.server.config import load_consortium
from medfl.server.enrolling import Registrar
from medfl.server.founding import found
from medfl.shared.certificates import SiteFiles, check_certificate
from medfl.shared.enrolment import make_keys


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three sites are enrolled, and only north has not joined yet."""
    found_consortium_folder(tmp_path)
    for name in ("authority.pem", "client.pem", "consortium.json"):
        (tmp_path / "north" / "keys" / name).unlink()
    shutil.rmtree(tmp_path / "north" / "state")
    (tmp_path / "north" / "site.yaml").write_text(
        "site: north\nkeys: keys\nstate: state\ndata: {source: dicom, folder: images}\n"
    )
    return tmp_path


def registrar(root: Path) -> Registrar:
    return Registrar(load_consortium(root / "fl" / "consortium.yaml"))


def join(root: Path, *more: str, invitation: Path | None = None) -> int:
    invitation = invitation or root / "fl" / "invitations" / "north.json"
    return main(["--site", str(root / "north" / "site.yaml"), "join", str(invitation), *more])


def test_both_fingerprints_join_and_confirm_without_a_question(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trusted = registrar(root)
    roster = trusted.rosters.newest().fingerprint
    assert join(root, "--fingerprint", trusted.fingerprint, "--roster", roster) == 0
    out = capsys.readouterr().out
    assert "[x] 4." in out
    files = SiteFiles(root / "north" / "keys")
    assert check_certificate(files.certificate, authority=files.authority) > 300
    rosters = site_rosters(site_settings(root, "north"))
    assert rosters.in_force() == rosters.newest() == trusted.rosters.newest()
    assert load_pin(files.folder).consortium == "fl"


def test_a_person_types_what_the_coordinator_reads_out_and_says_yes_to_the_others(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = registrar(root).fingerprint[len("SHA256:") :][:16]
    answers = iter([f" {heard[:8]} {heard[8:]} ", "yes"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    assert join(root) == 0
    assert site_rosters(site_settings(root, "north")).in_force() is not None


@pytest.mark.parametrize("beginning", [0, len("SHA256:") + 15, 16])
def test_too_few_characters_are_not_a_comparison_and_no_alarm(
    root: Path, beginning: int, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = registrar(root).fingerprint[:beginning]
    assert join(root, "--fingerprint", heard) == 3
    err = capsys.readouterr().err
    assert "give at least 16 after SHA256:" in err
    assert "swapped" not in err
    assert not joined(root / "north" / "keys")


def test_a_swapped_invitation_is_refused_and_nothing_of_it_is_installed(
    root: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody on the way enrols the very request in a consortium of his own: only the telephone call tells."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    found(elsewhere / "fl", hosts=["127.0.0.1"], port=9443)
    theirs = registrar(elsewhere)
    (swapped,) = theirs.approve([make_keys(root / "north" / "keys", "north")])
    assert join(root, "--fingerprint", registrar(root).fingerprint, invitation=swapped.invitation) == 3
    assert "somebody may have swapped the file" in capsys.readouterr().err
    assert not joined(root / "north" / "keys")
    assert not SiteFiles(root / "north" / "keys").certificate.exists()
    assert not (root / "north" / "state" / "roster" / "2.json").exists()


def test_another_consortium_does_not_replace_the_pinned_one(
    root: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = registrar(root)
    assert join(root, "--fingerprint", mine.fingerprint, "--roster", mine.rosters.newest().fingerprint) == 0
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    found(elsewhere / "fl", hosts=["127.0.0.1"], port=9443)
    theirs = registrar(elsewhere)
    (other,) = theirs.approve([make_keys(root / "north" / "keys", "north")])
    assert join(root, "--fingerprint", theirs.fingerprint, invitation=other.invitation) == 3
    assert "another consortium is pinned here" in capsys.readouterr().err


def test_a_roster_that_is_not_confirmed_leaves_the_site_joined_and_waiting(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "no")
    assert join(root, "--fingerprint", registrar(root).fingerprint) == 3
    assert joined(root / "north" / "keys")
    rosters = site_rosters(site_settings(root, "north"))
    assert rosters.in_force() is None
    confirm = ["--site", str(root / "north" / "site.yaml"), "roster", "confirm", "--fingerprint"]
    assert main([*confirm, "SHA256:another"]) == 3
    assert rosters.in_force() is None
    fingerprint = registrar(root).rosters.newest().fingerprint
    assert main([*confirm, fingerprint[:-1]]) == 3  # a coordinator could make two rosters that begin alike
    assert main([*confirm, fingerprint]) == 0
    assert rosters.in_force() is not None
    assert main([*confirm[:2], "roster", "show"]) == 0


def test_where_nobody_can_answer_the_option_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", nobody)
    assert join(root) == 2
    assert "give the answer as an option" in capsys.readouterr().err


def test_joining_needs_neither_torch_nor_flower() -> None:
    code = (
        "import sys, medfl.client.commands.join, medfl.client.joining, medfl.client.trust, medfl.server.enrolling\n"
        "assert not {'torch', 'flwr', 'monai'} & set(sys.modules), 'slow'"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False).returncode == 0
