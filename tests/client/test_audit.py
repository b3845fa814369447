"""The log itself: damage is found, nothing is unlogged after any kill, and what cannot be written is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medfl.client.audit import Audit, Price
from medfl.shared import chain as chains
from medfl.shared.audit_log import audit_file
from medfl.shared.chain import inspect
from medfl.shared.errors import ConfigError, PolicyRefusal
from medfl.shared.passage import Answer, Content, Form, Passage

STUDY = "5" * 64
PASSAGE = Passage("train", STUDY, 3)
CONTENT = Content(1000, "c" * 64)


def written(path: Path) -> bytes:
    """Start, one training in and out, stop: four rows."""
    audit = Audit(path)
    audit.started(release="1.0", configuration="f" * 64)
    audit.received(PASSAGE, CONTENT)
    audit.leaves(PASSAGE, Answer("trained"), form=Form.CLEAR, content=CONTENT, price=Price(0.5, 1.5))
    audit.stopped()
    audit.close()
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return audit_file(tmp_path / "state")


def test_a_row_holds_what_happened_and_no_field_without_a_value(path: Path) -> None:
    rows = [json.loads(line) for line in written(path).splitlines()]
    for row in rows:
        for key in ("row", "previous", "hash", "time"):
            del row[key]
    passage = {"kind": "train", "study": STUDY, "round": 3, "bytes": 1000, "sha256": "c" * 64}
    assert rows == [
        {"event": "started", "release": "1.0", "configuration": "f" * 64},
        {"event": "in", **passage},
        {"event": "out", **passage, "outcome": "trained", "form": "clear", "epsilon": 0.5, "epsilon_total": 1.5},
        {"event": "stopped"},
    ]


def test_the_file_is_in_the_state_folder_for_the_owner_only(path: Path) -> None:
    written(path)
    assert path.name == "audit.jsonl"
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


Damage = Callable[[list[bytes]], list[bytes]]
DAMAGES: dict[str, Damage] = {
    "edited": lambda rows: [*rows[:2], rows[2].replace(b'"bytes":1000', b'"bytes":1001'), rows[3]],
    "inserted": lambda rows: [*rows[:2], rows[1], *rows[2:]],
    "removed": lambda rows: [*rows[:2], rows[3]],
    "truncated": lambda rows: rows[:2],
    "torn and changed": lambda rows: [*rows[:3], rows[3][:30] + b"x"],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_log_is_told_and_no_node_starts_on_it(name: str, path: Path) -> None:
    path.write_bytes(b"".join(DAMAGES[name](written(path).splitlines(keepends=True))))
    assert inspect(path).problem is not None
    with pytest.raises(PolicyRefusal, match="moved to a safe place") as refusal:
        Audit(path)
    assert refusal.value.reason == "audit log damaged"


def test_a_row_torn_by_a_kill_is_completed_at_the_next_start(path: Path) -> None:
    content = written(path)
    path.write_bytes(content[:-25])
    assert inspect(path).problem is None
    Audit(path).close()
    assert path.read_bytes() == content


def test_a_second_node_on_the_same_log_is_a_configuration_error(path: Path) -> None:
    first = Audit(path)
    with pytest.raises(ConfigError, match="stop the other process"):
        Audit(path)
    first.close()


@pytest.mark.parametrize("what", ["write_whole", "os.write", "os.fsync"])
def test_a_full_disk_refuses_and_the_log_goes_on_when_there_is_space(
    what: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    audit = Audit(path)
    audit.received(PASSAGE, CONTENT)
    owner = chains.os if what.startswith("os.") else chains
    monkeypatch.setattr(owner, what.removeprefix("os."), full)
    with pytest.raises(PolicyRefusal, match="No space left") as refusal:
        audit.leaves(PASSAGE, Answer("trained"), form=Form.CLEAR, content=CONTENT)
    assert refusal.value.reason == "audit log unwritable"
    monkeypatch.undo()
    audit.close()
    reopened = Audit(path)
    reopened.stopped()
    reopened.close()
    assert inspect(path).problem is None
    events = [row["event"] for row in inspect(path).rows]
    # A row that was announced before the disk was full is completed: it may say more than what left, never less.
    assert events == (["in", "out", "stopped"] if what == "os.write" else ["in", "stopped"])


# Stands for the client: log, and only then let something leave (the pipe). Lives where a kill hurts.
WORKER = """
import os, sys
from pathlib import Path
from medfl.client.audit import Audit
from medfl.shared.passage import Answer, Content, Form, Passage
audit = Audit(Path(sys.argv[1]))
os.write(1, b"ready\\n")
for number in range(audit.head.rows, 10_000):
    digest = f"{number:064x}"
    audit.leaves(Passage("train"), Answer("trained"), form=Form.CLEAR, content=Content(1, digest))
    os.write(1, f"left {digest}\\n".encode())
"""


def test_a_kill_at_any_moment_leaves_no_release_without_its_row(path: Path) -> None:
    chance, left = random.Random(1), set()
    for _ in range(5):
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(path)], stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        for _ in range(chance.randrange(1, 4)):
            left.add(worker.stdout.readline().split()[1])
        time.sleep(chance.uniform(0, 0.02))
        os.kill(worker.pid, 9)
        left |= {line.split()[1] for line in worker.stdout if line.startswith("left ") and line.endswith("\n")}
        worker.wait(timeout=120)
        Audit(path).close()  # completes what the kill tore
        assert left <= {row["sha256"] for row in inspect(path).rows}
    assert len(left) >= 5
