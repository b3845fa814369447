"""The coordinator's audit log: what went out is there first, what came in a moment later, and never what it said."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from consortium import found_consortium_folder
from scripted import ScriptedGrid, ScriptedSite

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Message, RecordDict

from medfl.server.audit import Audit, Event, seen_head
from medfl.server.audited_grid import AuditedGrid
from medfl.server.cli import main
from medfl.server.config import load_consortium
from medfl.server.rosters import RosterFolder
from medfl.shared import chain as chains
from medfl.shared.audit_log import audit_file, inspected
from medfl.shared.chain import Head, inspect
from medfl.shared.errors import Code, ConfigError, PolicyRefusal
from medfl.shared.messages import Failure, Kind, ModelRequest, SecureReply, SecureRequest, TrainReply
from medfl.shared.observed import measured
from medfl.shared.passage import Answer, Content, Form, Passage
from medfl.shared.secagg.exchange import Phase, PhaseReply

STUDY = "ab" * 32
WEIGHTS = np.arange(5, dtype=np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "audit.jsonl"


def rows(path: Path) -> list[dict[str, Any]]:
    found = inspect(path)
    assert found.problem is None
    return found.rows


class Answering(ScriptedSite):
    """Answers a request to train with ``content``."""

    def __init__(self, content: RecordDict | None) -> None:
        super().__init__()
        self.content = content

    def __call__(self, message: Message) -> RecordDict | None:
        return self.content


class Named:
    names: ClassVar[dict[int, str]] = {2: "north"}


class Watched:
    """A grid with an audit log over one site that gives ``answer``."""

    def __init__(self, path: Path, answer: RecordDict | None) -> None:
        self.path, self.audit = path, Audit(path)
        self.inner = ScriptedGrid({"north": Answering(answer)})
        self.grid = AuditedGrid(self.inner, self.audit, study=STUDY, members=Named())

    def send(self, content: RecordDict, kind: Kind = Kind.TRAIN) -> list[str]:
        return list(self.grid.push_messages([Message(content, dst_node_id=2, message_type=kind.value, ttl=5.0)]))


def test_a_request_is_on_the_disk_before_it_goes_out_and_its_reply_once_nothing_more_is_awaited(path: Path) -> None:
    reply = TrainReply(WEIGHTS, 3, {"loss": 1.5}).record()
    watched = Watched(path, reply)
    request = ModelRequest(STUDY, 7, WEIGHTS).record()
    seen_at_push: list[int] = []
    push = watched.inner.push_messages
    watched.inner.push_messages = lambda messages: (seen_at_push.append(len(rows(path))), push(messages))[1]  # type: ignore[method-assign]
    (identity,) = watched.send(request)
    assert seen_at_push == [1]
    assert list(watched.grid.pull_messages([identity])) != []
    sent, came = rows(path)
    assert {k: sent[k] for k in ("event", "site", "kind", "study", "round", "bytes", "sha256")} == {
        "event": "out", "site": "north", "kind": "train", "study": STUDY, "round": 7,
        "bytes": measured(request).bytes, "sha256": request.object_id,
    }  # fmt: skip
    assert (came["event"], came["outcome"], came["form"], came["sha256"]) == ("in", "trained", "clear", reply.object_id)
    assert (came["kind"], came["round"]) == ("train", 7)


def test_nothing_of_what_a_message_says_is_in_the_log(path: Path) -> None:
    watched = Watched(path, TrainReply(WEIGHTS, 31415, {"loss": 2.71828}).record())
    watched.grid.pull_messages(watched.send(ModelRequest(STUDY, 7, WEIGHTS).record()))
    text = path.read_text()
    assert "31415" not in text
    assert "2.71828" not in text


def test_the_phases_of_a_sum_stand_under_the_study_and_the_round_that_is_running(path: Path) -> None:
    watched = Watched(path, SecureReply(PhaseReply(b"x", WEIGHTS.view(np.uint32), np.zeros(2, np.uint64))).record())
    watched.send(ModelRequest(STUDY, 7, WEIGHTS).record())
    watched.grid.pull_messages(watched.send(SecureRequest(Phase.MASKED_INPUT, b"control").record(), Kind.PHASE))
    sent, came = rows(path)[1:]
    assert (sent["phase"], sent["round"], sent["study"]) == ("masked_input", 7, STUDY)
    assert (came["phase"], came["form"]) == ("masked_input", "masked")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Failure(Code.REFUSED, "cohort too small").record(), ("failed", "refused", "cohort too small")),
        (RecordDict(), ("failed", "protocol", "malformed reply")),
    ],
    ids=["refusal", "malformed"],
)
def test_a_refusal_and_a_malformed_reply_stand_in_the_log(
    path: Path, answer: RecordDict, words: tuple[str, str, str]
) -> None:
    watched = Watched(path, answer)
    watched.grid.pull_messages(watched.send(ModelRequest(STUDY, 7, WEIGHTS).record()))
    came = rows(path)[1]
    assert (came["outcome"], came["code"], came["reason"]) == words


def test_a_reply_is_durable_at_the_next_pull_although_others_are_still_awaited(path: Path) -> None:
    watched = Watched(path, TrainReply(WEIGHTS, 3).record())
    ids = [*watched.send(ModelRequest(STUDY, 1, WEIGHTS).record()), "never answered"]
    assert len(list(watched.grid.pull_messages(ids))) == 1
    assert len(rows(path)) == 1
    assert list(watched.grid.pull_messages(ids)) == []
    assert len(rows(path)) == 2


@contextmanager
def full_disk() -> Iterator[None]:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "write_whole", full)
        yield


def refused(work: Callable[[], object]) -> None:
    with pytest.raises(PolicyRefusal) as refusal:
        work()
    assert refusal.value.reason == "audit log unwritable"


def test_nothing_goes_out_when_the_disk_refuses(path: Path) -> None:
    watched = Watched(path, TrainReply(WEIGHTS, 3).record())
    with full_disk():
        refused(lambda: watched.send(ModelRequest(STUDY, 1, WEIGHTS).record()))
    assert watched.inner.asked == []
    watched.send(ModelRequest(STUDY, 1, WEIGHTS).record())  # space was made
    assert [row["event"] for row in rows(path)] == ["out"]  # what did not leave is not told of


def test_a_command_that_was_refused_for_want_of_space_is_not_told_of_later(path: Path) -> None:
    audit = Audit(path)
    with full_disk():
        refused(lambda: audit.commanded(Event.SUBMITTED, STUDY, "lungs", by="alice"))
    audit.started(release="1", configuration="ab" * 32)
    assert [row["event"] for row in rows(path)] == ["started"]


def test_a_stop_comes_first_and_is_told_of_once_there_is_space(path: Path) -> None:
    audit = Audit(path)
    with full_disk():
        refused(lambda: audit.commanded(Event.TOLD_TO_STOP, STUDY, "lungs", by="alice"))
    audit.flush()
    assert [row["event"] for row in rows(path)] == ["study told to stop"]


def test_who_was_approved_stands_in_the_log_once_however_often_the_disk_refused(tmp_path: Path, path: Path) -> None:
    found_consortium_folder(tmp_path)
    rosters = RosterFolder.of(load_consortium(tmp_path / "fl" / "consortium.yaml"))
    audit = Audit(path)
    with full_disk():
        for _ in range(3):
            refused(lambda: audit.note_rosters(rosters.newest_epoch, rosters.at))
    audit.note_rosters(rosters.newest_epoch, rosters.at)
    audit.note_rosters(rosters.newest_epoch, rosters.at)
    told = [(row["event"], row["site"]) for row in rows(path)]
    assert told == [("site approved", name) for name in ("north", "south", "west")]


def test_what_came_in_is_kept_until_there_is_space(path: Path) -> None:
    audit = Audit(path)
    audit.received("north", Passage("train", STUDY, 1), Answer("trained"), Form.CLEAR, Content(10, "ef" * 32))
    with full_disk():
        refused(audit.flush)
        refused(audit.stopped)
    audit.flush()
    assert [row["event"] for row in rows(path)] == ["in"]


def test_what_the_coordinator_does_itself_stands_in_the_log(path: Path) -> None:
    audit = Audit(path)
    audit.started(release="1", configuration="ab" * 32, roster="cd" * 32, epoch=2)
    audit.study_begun(STUDY, "lungs")
    audit.received("north", Passage("train", STUDY, 1), Answer("ready"), Form.NOTHING, Content(10, "ef" * 32))
    audit.study_ended(STUDY, "done", 3)
    audit.stopped()
    audit.close()
    events = [row["event"] for row in rows(path)]
    assert events == ["started", "study begun", "in", "study ended", "stopped"]
    with pytest.raises(ConfigError, match="another process"):
        Audit(path), Audit(path)


def head_seen(path: Path) -> None:
    audit = Audit(path)
    audit.started(release="1", configuration="ab" * 32)
    audit.head_seen("north", Head(5, "ab" * 32), study=STUDY, round_number=2, signed=True)
    audit.leaves([("north", Passage("train", STUDY, 2), Content(10, "ef" * 32))])
    audit.close()


def test_a_head_of_a_sites_log_is_found_and_one_that_was_never_seen_is_refused(path: Path) -> None:
    head_seen(path)
    assert seen_head(inspect(path), site="north", digest="ab" * 32).startswith("north's log had 5 rows")
    for site, digest in (("south", "ab" * 32), ("north", "cd" * 32)):
        with pytest.raises(PolicyRefusal, match="no head of"):
            seen_head(inspect(path), site=site, digest=digest)


def test_the_commands_verify_the_log_find_a_sites_head_and_write_every_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found_consortium_folder(tmp_path)
    config = str(tmp_path / "fl" / "consortium.yaml")
    assert main(["--config", config, "audit", "verify"]) == 2  # no log yet
    log = audit_file(load_consortium(Path(config)).state)
    head_seen(log)
    assert main(["--config", config, "audit", "verify"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 rows are as they were written\n")
    assert f"\n  {inspected(log).head.digest}\n" in out
    assert max(map(len, out.splitlines())) <= 80
    assert main(["--config", config, "audit", "verify", "--site", "north"]) == 2
    assert main(["--config", config, "audit", "verify", "--site", "north", "--head", "ab" * 32]) == 0
    assert main(["--config", config, "audit", "verify", "--site", "north", "--head", "cd" * 32]) == 3
    assert main(["--config", config, "audit", "report", "--out", str(tmp_path / "all.csv")]) == 0
    assert "head seen,north," in (tmp_path / "all.csv").read_text()
    log.write_bytes(log.read_bytes().replace(b'"release":"1"', b'"release":"2"'))
    assert main(["--config", config, "audit", "verify"]) == 3
    assert main(["--config", config, "audit", "report", "--out", str(tmp_path / "all.csv")]) == 3
