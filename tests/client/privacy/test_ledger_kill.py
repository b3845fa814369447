"""A real process charges and releases and is killed with SIGKILL: the ledger never says less than what left."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medfl.client.privacy.ledger import Ceilings, Ledger

STUDY = "a" * 64
CEILINGS = Ceilings(epsilon_per_study=1e4, epsilon_total=1e4)

# Stands for the client: charge, release, and only then let something leave (the pipe). No accounting, so that most of
# its life is spent where a kill hurts.
WORKER = f"""
import os, sys
from pathlib import Path
from medfl.client.privacy import ledger as ledgers
from medfl.shared.privacy.plan import TrainingPlan
from medfl.shared.privacy.settings import Unit
ledgers.epsilon = lambda history, delta: 0.0
plan = TrainingPlan(Unit.PATIENT, 1e4, 1e-5, 1.0, 5.0, 0.5, 8.0, 4)
for path in sys.stdin:
    if os.fork() == 0:
        os.setpgid(0, 0)
        with ledgers.Ledger(Path(path.strip()), cohort="all", ceilings=ledgers.Ceilings(1e4, 1e4)) as ledger:
            ledger.fix_plan("{STUDY}", plan, patients=100)
            start = len(ledger.history())
            os.write(1, b"pid %d\\n" % os.getpid())
            for number in range(start, start + 5000):
                name = f"{{os.getpid()}}-{{number}}"
                ledger.charge(ledgers.Charge("{STUDY}", number, name, plan.round_cost))
                ledger.release("{STUDY}", name, digest=name, size=1)
                os.write(1, b"left %s\\n" % name.encode())
        os._exit(0)
    os.wait()
    os.write(1, b"gone\\n")
"""


def kill_at_random_moments(path: Path, kills: int) -> None:
    # One interpreter forks the workers, so that a kill costs milliseconds and not an import of torch.
    parent = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    assert parent.stdout is not None
    chance, left = random.Random(1), []
    try:
        for _ in range(kills):
            print(path, file=parent.stdin, flush=True)
            started = parent.stdout.readline().split()
            assert started[0] == "pid"
            for _ in range(chance.randrange(4)):  # however slow the machine, some updates leave before the kill
                left.append(parent.stdout.readline().split()[1])
            time.sleep(chance.uniform(0, 0.005))
            os.kill(int(started[1]), 9)
            for line in parent.stdout:
                if line == "gone\n":
                    break
                left.append(line.split()[1])
            with Ledger(path, cohort="all", ceilings=CEILINGS) as ledger:
                charged = [row["training"] for row in ledger._rows("charge", STUDY)]
            assert set(left) <= set(charged)
            assert len(charged) - len(left) <= kills  # at most one training was charged in vain at each kill
    finally:
        parent.stdin.close()
        parent.wait(timeout=20)
    assert len(left) >= kills  # the workers did work


def test_twenty_kills_never_leave_an_uncharged_release(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path / "ledger.jsonl", 20)


@pytest.mark.slow
def test_two_hundred_kills_never_leave_an_uncharged_release(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path / "ledger.jsonl", 200)
