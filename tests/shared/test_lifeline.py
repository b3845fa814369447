from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_for

from medfl.shared.lifeline import with_lifeline

CHILD = "import sys, time\nprint(sys.argv[1:], flush=True)\ntime.sleep(60)\n"
PARENT = """
import subprocess, sys, time
from medfl.shared.lifeline import with_lifeline
command = [sys.executable, "-m", "sleeper", "one", "two"] if sys.argv[1] == "without" else None
command = command or with_lifeline("sleeper", "one", "two")
child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline(), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at the parent's death is Linux's")
@pytest.mark.parametrize("how", ["with", "without"])
def test_a_child_ends_with_its_killed_parent_only_where_it_was_asked_to(tmp_path: Path, how: str) -> None:
    (tmp_path / "sleeper.py").write_text(CHILD)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        child, _, said = parent.stdout.readline().decode().strip().partition(" ")
        assert said == "['one', 'two']"
        assert runs(int(child))
        parent.kill()
    if how == "with":
        wait_for(lambda: not runs(int(child)))
    else:
        assert runs(int(child))
        os.kill(int(child), signal.SIGKILL)


def test_a_child_whose_parent_lives_runs_to_its_end_with_its_own_status() -> None:
    done = subprocess.run(with_lifeline("medfl.client.cli", "--no-such-option"), capture_output=True, check=False)
    assert done.returncode == 2
    assert b"usage: medfl-client" in done.stderr


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False
