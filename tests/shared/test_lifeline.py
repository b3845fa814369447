from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_for

from medfl.shared.lifeline import ending_with_us

PARENT = """
import subprocess, sys, time
from medfl.shared.lifeline import ending_with_us
lifeline = ending_with_us() if sys.argv[1] == "with" else None
child = subprocess.Popen(["sleep", "60"], preexec_fn=lifeline, start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at the parent's death is Linux's")
@pytest.mark.parametrize("how", ["with", "without"])
def test_a_child_ends_with_its_killed_parent_only_where_it_was_asked_to(how: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    if how == "with":
        wait_for(lambda: not runs(child), 5)
    else:
        assert runs(child)
        os.kill(child, signal.SIGKILL)


def test_a_child_whose_parent_lives_is_left_alone() -> None:
    done = subprocess.run([sys.executable, "-c", "print('here')"], preexec_fn=ending_with_us(), capture_output=True)
    assert done.stdout == b"here\n"


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False
