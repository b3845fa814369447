from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medfl.simulations import processes as module
from medfl.simulations.processes import Processes

OBEDIENT = "import time; print('here', flush=True); time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(60)"
)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module and gives its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(text: str) -> str:
        name = f"program_{len(list(tmp_path.glob('program_*')))}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def wait_for(log: Path) -> None:
    end = time.monotonic() + 120
    while not (log.exists() and "here" in log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_processes_are_asked_to_end_when_the_block_does(tmp_path: Path, program: Callable[[str], str]) -> None:
    with Processes() as running:
        process = running.start("a", program(OBEDIENT), [], log=tmp_path / "logs" / "a")
        wait_for(tmp_path / "logs" / "a")
        assert running.failed() == {}
    assert process.returncode == -15


def test_processes_end_when_the_parent_fails(tmp_path: Path, program: Callable[[str], str]) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def parent() -> None:
        with Processes() as running:
            started.append(running.start("a", program(OBEDIENT), [], log=tmp_path / "a"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parent()
    assert started[0].poll() is not None


def test_a_process_that_does_not_listen_is_killed(
    tmp_path: Path, program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.2)
    with Processes() as running:
        running.start("a", program(STUBBORN), [], log=tmp_path / "a")
        wait_for(tmp_path / "a")
        assert running.stop_all() == {"a": -9}


def test_a_process_that_failed_is_named_with_its_status(tmp_path: Path, program: Callable[[str], str]) -> None:
    with Processes() as running:
        bad = running.start("bad", program("import sys; print('why'); sys.exit(3)"), [], log=tmp_path / "bad")
        good = running.start("good", program("pass"), [], log=tmp_path / "good")
        bad.wait(120)
        good.wait(120)
        assert running.failed() == {"bad": 3}
    assert (tmp_path / "bad").read_text() == "why\n"


def test_arguments_and_environment_reach_the_process(tmp_path: Path, program: Callable[[str], str]) -> None:
    name = program("import os, sys; print(sys.argv[1:], os.environ['COLOUR'])")
    with Processes() as running:
        running.start("a", name, ["x", "y"], log=tmp_path / "a", environment={"COLOUR": "blue"}).wait(120)
    assert (tmp_path / "a").read_text() == "['x', 'y'] blue\n"


def test_the_demonstrations_parent_does_not_import_pytorch() -> None:
    code = "import sys, medfl.simulations.demo; assert not {'torch', 'monai', 'highdicom'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
