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
        parent.wait(timeout=120)
    assert len(left) >= kills  # the workers did work


def test_twenty_kills_never_leave_an_uncharged_release(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path / "ledger.jsonl", 20)


@pytest.mark.slow
def test_two_hundred_kills_never_leave_an_uncharged_release(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path / "ledger.jsonl", 200)


# The whole client but its connection: it is offered a study, trains rounds of it with noise, keeps its answers on disk.
SITE = """
import os, sys
from pathlib import Path
import numpy as np
import torch
from sites import make_site, offer, policy_for, start, train
from tiny import classes_study
from medfl.client.privacy import ledger as ledgers
from medfl.client.records import FolderRecords
from medfl.shared.messages import OfferAccepted, TrainReply
from medfl.shared.weights import weights_digest
ledgers.epsilon = lambda history, delta: 0.0
torch.set_num_threads(1)
privacy = {"mode": "dp-sgd", "epsilon": 1e4, "delta": 1e-3, "noise_multiplier": 100.0, "steps_per_round": 1,
           "expected_batch": 2}
study = classes_study(privacy=privacy, rounds={"count": 10000})
policy = policy_for(study, max_epsilon_per_study=1e4, max_epsilon_total=1e4, max_delta=1e-3)
weights = start(study)
for line in sys.stdin:
    if os.fork() == 0:
        os.setpgid(0, 0)
        folder = Path(line.strip())
        site = make_site(study, folder, policy=policy, records=FolderRecords(folder / "state"))
        OfferAccepted.parse(offer(site, study))
        os.write(1, b"pid %d\\n" % os.getpid())
        number = len(site._trainer.ledger.history())
        while True:
            number += 1
            reply = TrainReply.parse(train(site, study, weights, number))
            os.write(1, b"left %s\\n" % weights_digest(reply.update).encode())
    os.wait()
    os.write(1, b"gone\\n")
"""


def kill_the_client_at_random_moments(folder: Path, kills: int) -> None:
    support = Path(__file__).parents[2] / "support"
    environment = os.environ | {"PYTHONPATH": str(support), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, "-c", SITE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    chance, left = random.Random(2), []
    try:
        for _ in range(kills):
            print(folder, file=parent.stdin, flush=True)
            started = parent.stdout.readline().split()
            assert started[0] == "pid"
            for _ in range(chance.randrange(3)):
                left.append(parent.stdout.readline().split()[1])
            time.sleep(chance.uniform(0, 0.02))
            os.kill(int(started[1]), 9)
            for line in parent.stdout:
                if line == "gone\n":
                    break
                left.append(line.split()[1])
    finally:
        parent.kill()
        parent.wait()
    with Ledger(folder / "north" / "ledger.jsonl", cohort="north", ceilings=CEILINGS) as ledger:
        charged = {row["training"] for row in ledger._rows("charge", None)}
        released = {row["digest"]: row["training"] for row in ledger._rows("release", None)}
    assert len(left) >= kills / 2  # the client did work
    assert set(left) <= set(released)
    assert set(released.values()) <= charged
    assert len(set(released.values())) == len(released)  # no charge pays for two updates
    assert len(charged) - len(left) <= kills


def test_a_client_killed_eight_times_has_charged_all_that_left(tmp_path: Path) -> None:
    kill_the_client_at_random_moments(tmp_path, 8)


@pytest.mark.slow
def test_a_client_killed_two_hundred_times_has_charged_all_that_left(tmp_path: Path) -> None:
    kill_the_client_at_random_moments(tmp_path, 200)
