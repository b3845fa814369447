"""What of a message gets into the audit log: there before the reply is, and nothing leaves without it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from signer import offer_of
from sites import make_site, policy_for, start
from tiny import LOGISTIC_VALUES, classes_study

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from medfl.client.app import build_client_app
from medfl.client.audit import Audit
from medfl.client.notice import Notice
from medfl.client.policy import Policy
from medfl.client.site import Site
from medfl.client.witness import Witness
from medfl.shared import chain as chains
from medfl.shared.audit_log import audit_file
from medfl.shared.chain import Row, inspect
from medfl.shared.errors import Code, DataError, PolicyRefusal
from medfl.shared.messages import Failure, HeadsRequest, Kind, ModelRequest, TrainReply, pack
from medfl.shared.observed import form_of, measured
from medfl.shared.passage import Form
from medfl.shared.study import Study

PATIENT = "MUSTERMANN^ERIKA"
PRIVACY: dict[str, Any] = {
    "mode": "dp-sgd",
    "epsilon": 8,
    "delta": 1e-2,
    "clip_norm": 1.0,
    "expected_batch": 2,
    "noise_multiplier": 0.7,
    "steps_per_round": 3,
}


class Witnessed:
    """A site behind its witnessed ClientApp."""

    def __init__(self, site: Site, folder: Path) -> None:
        self.site, self.path = site, audit_file(folder / "state")
        self.audit = Audit(self.path)
        self.witness = Witness(self.audit, site)
        self._app = build_client_app(lambda _: site, witness=self.witness)

    def call(self, kind: Kind, content: RecordDict) -> RecordDict:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        message = Message(content, dst_node_id=2, message_type=kind.value)
        context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
        return self._app(message, context).content

    def offer(self, study: Study) -> RecordDict:
        return self.call(Kind.OFFER, offer_of(study).record())

    def train(self, study: Study, number: int = 1) -> RecordDict:
        return self.call(Kind.TRAIN, ModelRequest(study.digest, number, start(study)).record())

    @property
    def rows(self) -> list[Row]:
        """As another process finds them on the disk at this moment."""
        found = inspect(self.path)
        assert found.problem is None
        return found.rows

    def close(self) -> None:
        self.site.close()
        self.audit.close()


@pytest.fixture
def study() -> Study:
    return classes_study()


@pytest.fixture
def here(study: Study, tmp_path: Path) -> Iterator[Witnessed]:
    witnessed = Witnessed(make_site(study, tmp_path), tmp_path)
    yield witnessed
    witnessed.close()


def test_an_offer_and_a_training_are_there_with_kind_study_round_size_and_digest(here: Witnessed, study: Study) -> None:
    assert here.offer(study)["config"]["outcome"] == "accepted"
    asked = ModelRequest(study.digest, 2, start(study)).record()
    reply = here.call(Kind.TRAIN, asked)
    offered, accepted, trains, trained = here.rows
    assert (offered["event"], offered["kind"], offered["name"]) == ("in", "query.offer", "tiny")
    assert (accepted["event"], accepted["outcome"], accepted["form"]) == ("out", "accepted", "no result")
    assert {row["study"] for row in here.rows} == {study.digest}
    assert (trains["event"], trains["kind"], trains["round"]) == ("in", "train", 2)
    assert (trains["sha256"], trained["sha256"]) == (asked.object_id, reply.object_id)
    # 34 values of 4 bytes after numpy's header of 128 bytes, and beside them a few hundred bytes of fields
    update = 4 * LOGISTIC_VALUES + 128
    assert update < trained["bytes"] < update + 1000
    assert (trained["outcome"], trained["form"], trained["round"]) == ("trained", "clear", 2)
    assert "epsilon" not in trained


def test_the_digest_changes_with_one_bit_and_the_size_with_one_value() -> None:
    vector = np.zeros(10, np.float32)
    before = measured(RecordDict({"arrays": pack(vector)}))
    assert before.bytes == 10 * 4 + 128
    assert measured(RecordDict({"arrays": pack(np.zeros(11, np.float32))})).bytes == 11 * 4 + 128
    vector[3] = -0.0
    assert measured(RecordDict({"arrays": pack(vector)})).sha256 != before.sha256


def test_only_arrays_and_tallies_are_results() -> None:
    config, tally = ConfigRecord({"outcome": "x"}), MetricRecord({"loss": 1.0})
    update = pack(np.zeros(2, np.float32))
    assert form_of(RecordDict({"config": config})) is Form.NOTHING
    assert form_of(RecordDict({"config": config, "tally": MetricRecord()})) is Form.NOTHING
    assert form_of(RecordDict({"config": config, "tally": tally})) is Form.CLEAR
    assert form_of(RecordDict({"config": config, "arrays": update})) is Form.CLEAR
    assert form_of(RecordDict({"config": config, "masked": ArrayRecord()})) is Form.MASKED


def test_the_epsilon_of_a_private_round_stands_in_the_row_of_its_release(tmp_path: Path) -> None:
    study = classes_study(privacy=PRIVACY)
    rules = policy_for(study, max_epsilon_per_study=8, max_epsilon_total=8, max_delta=1e-2)
    here = Witnessed(make_site(study, tmp_path, policy=rules), tmp_path)
    here.offer(study)
    here.train(study)
    spent = here.site.price(study.digest)
    assert spent is not None
    assert 0 < spent.epsilon < 8
    assert (here.rows[-1]["epsilon"], here.rows[-1]["epsilon_total"]) == (spent.epsilon, spent.epsilon_total)
    assert ["epsilon" in row for row in here.rows] == [False, False, False, True]  # only where results leave
    here.close()


def test_a_refused_study_leaves_its_reason(study: Study, tmp_path: Path) -> None:
    here = Witnessed(make_site(study, tmp_path, policy=Policy()), tmp_path)
    here.offer(study)
    row = here.rows[-1]
    assert (row["outcome"], row["code"], row["reason"]) == ("failed", "refused", "study not approved")
    here.close()


def test_what_comes_in_is_on_the_disk_before_any_work_and_what_leaves_before_the_reply(
    here: Witnessed, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.offer(study)
    seen: list[int] = []
    train = here.site.train
    monkeypatch.setattr(here.site, "train", lambda request: seen.append(len(here.rows)) or train(request))
    reply = here.train(study)
    assert seen == [3]  # offer in and out, training in
    assert here.rows[3]["sha256"] == reply.object_id


class Killed(BaseException):
    """Stands for a kill: nothing below a process's end catches it."""


def test_a_site_killed_while_it_writes_the_row_has_sent_nothing(
    here: Witnessed, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.offer(study)

    def kill(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(here.audit, "leaves", kill)
    with pytest.raises(Killed):
        here.train(study)  # no reply came back that could be sent
    assert here.rows[-1]["event"] == "in"


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def refused(content: RecordDict) -> bool:
    failure = Failure.parse(content)
    return (failure.code, failure.reason) == (Code.REFUSED, "audit log unwritable") and set(content) == {"config"}


def test_a_full_disk_refuses_before_anything_is_trained(
    here: Witnessed, study: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here.offer(study)
    trained: list[object] = []
    monkeypatch.setattr(here.site, "train", trained.append)
    monkeypatch.setattr(chains, "write_whole", full)
    assert refused(here.train(study))
    assert trained == []
    assert "audit.jsonl cannot be written" in caplog.text


def test_a_disk_that_fills_up_during_training_keeps_the_update_here(
    here: Witnessed, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.offer(study)
    train = here.site.train

    def train_and_fill(request: ModelRequest) -> object:
        reply = train(request)
        monkeypatch.setattr(chains, "write_whole", full)
        return reply

    monkeypatch.setattr(here.site, "train", train_and_fill)
    assert refused(here.train(study))
    monkeypatch.undo()
    assert TrainReply.parse(here.train(study)).update.size == LOGISTIC_VALUES  # space was made
    assert [row["event"] for row in here.rows] == ["in", "out", "in", "in", "out"]


def test_no_name_gets_into_the_log_whoever_writes_it_into_a_message_or_an_error(study: Study, tmp_path: Path) -> None:
    errors = [DataError, RuntimeError]

    def load(_: Study) -> Any:
        raise errors.pop()(f"/pacs/{PATIENT}/ct.dcm is damaged")

    here = Witnessed(make_site(study, tmp_path, data=load), tmp_path)
    here.offer(study)
    here.offer(study)
    assert errors == []
    named = ConfigRecord({"study": PATIENT, "server-round": PATIENT, "protocol": 1, PATIENT: PATIENT})
    for kind in Kind:
        here.call(kind, RecordDict({"config": named}))
        here.call(kind, RecordDict({PATIENT: named}))
    here.witness.node_says(Notice(PATIENT, PATIENT, PATIENT, PATIENT, 1, 1), Code.REFUSED, "study not approved")
    here.close()
    assert len(here.rows) == 4 + 2 * 2 * len(Kind) + 1
    assert here.rows[-1]["kind"] == "unknown"
    assert "MUSTERMANN" not in here.path.read_text() + here.path.with_name("audit.jsonl.head").read_text()


def test_the_number_of_images_that_goes_with_an_update_is_not_in_the_log(here: Witnessed, study: Study) -> None:
    here.offer(study)
    here.train(study)
    known = {"event", "kind", "study", "round", "name", "bytes", "sha256", "outcome", "form"}
    assert {key for row in here.rows for key in row} == known | {"row", "previous", "time", "hash"}


def test_the_heads_of_logs_are_no_result(here: Witnessed, study: Study) -> None:
    here.offer(study)
    here.call(Kind.HEADS, HeadsRequest(study.digest, 1).record())
    assert (here.rows[-1]["outcome"], here.rows[-1]["form"]) == ("heads", "no result")


def test_a_word_of_the_node_itself_is_there_or_refused(
    here: Witnessed, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    notice = Notice(Kind.TRAIN.value, "1", "tiny", study.digest, 1, 1)
    here.witness.node_says(notice, Code.REFUSED, "study not approved")
    row = here.rows[-1]
    assert (row["event"], row["kind"], row["study"], row["code"]) == ("out", "train", study.digest, "refused")
    monkeypatch.setattr(chains, "write_whole", full)
    with pytest.raises(PolicyRefusal) as refusal:
        here.witness.node_says(notice, Code.REFUSED, "study not approved")
    assert refusal.value.reason == "audit log unwritable"


def test_without_a_witness_nothing_is_written(study: Study, tmp_path: Path) -> None:
    site = make_site(study, tmp_path)
    app = build_client_app(lambda _: site)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(offer_of(study).record(), dst_node_id=2, message_type="query.offer")
    app(message, Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={}))
    assert list(tmp_path.iterdir()) == []
