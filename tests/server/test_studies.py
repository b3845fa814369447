"""The store and the desk: what is submitted is kept in order, whatever is killed, and stops and goes on when asked."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path

import pytest
from signer import KEY, verify
from tiny import classes_study

from medfl.server.audit import Event
from medfl.server.desk import LIST, SUBMIT, Checks, Desk, Named, StudyStop, Submission
from medfl.server.progress import begin_folder, progress_of, run_folder
from medfl.server.reporter import MetricsFile, RoundReport
from medfl.server.studies import State, StudyStore
from medfl.shared.admin import AdminSocket, Nothing, ask
from medfl.shared.errors import ConfigError, PolicyRefusal, ProtocolError
from medfl.shared.signing import Document, Signed, sign
from medfl.shared.study import Study, named

BY = "alex"
FIRST, SECOND = classes_study(name="first"), classes_study(name="second")


def signed(study: Study) -> Signed:
    return sign(KEY, Document.STUDY, study.canonical())


def submission(study: Study) -> Submission:
    return Submission(signed=signed(study).to_bytes().decode(), by=BY)


def refuse_krum(study: Study) -> None:
    if study.strategy.name == "krum":
        raise ConfigError("krum could never run here")


@pytest.fixture
def noted() -> list[str]:
    return []


@pytest.fixture
def desk(tmp_path: Path, noted: list[str]) -> Desk:
    def note(event: Event, study: Study, by: str) -> None:
        noted.append(f"{event.value}: {study.name} by {by}")

    return Desk(StudyStore(tmp_path / "state"), tmp_path / "runs", Checks(verify, refuse_krum), note=note, running=True)


def test_what_a_person_asked_for_is_noted_once_and_what_was_refused_is_not(desk: Desk, noted: list[str]) -> None:
    for _ in range(2):
        desk.submit(submission(FIRST))
    desk.stop(Named(digest=FIRST.digest, by=BY))
    with pytest.raises(ConfigError):
        desk.stop(Named(digest=FIRST.digest, by=BY))
    desk.resume(Named(digest=FIRST.digest, by=BY))
    with pytest.raises(ConfigError):
        desk.resume(Named(digest=FIRST.digest, by=BY))
    assert noted == [
        "study submitted: first by alex",
        "study told to stop: first by alex",
        "study resumed: first by alex",
    ]


def test_nothing_is_submitted_or_resumed_while_it_cannot_be_noted_and_a_stop_is_a_stop(desk: Desk) -> None:
    def unwritable(event: Event, study: Study, by: str) -> None:
        raise PolicyRefusal("the disk refuses", reason="audit log unwritable")

    desk.submit(submission(FIRST))
    desk._note = unwritable
    with pytest.raises(PolicyRefusal):
        desk.submit(submission(SECOND))
    with pytest.raises(PolicyRefusal):
        desk.stop(Named(digest=FIRST.digest, by=BY))
    with pytest.raises(PolicyRefusal):
        desk.resume(Named(digest=FIRST.digest, by=BY))
    assert [entry.record.state for entry in desk.store.entries()] == [State.STOPPED]


def next_name(desk: Desk) -> str | None:
    entry = desk.next()
    return None if entry is None else entry.study.name


def test_studies_have_their_turn_in_order_of_submission(desk: Desk) -> None:
    assert desk.next() is None
    desk.submit(submission(SECOND))
    found = desk.submit(submission(FIRST))
    assert (found.number, found.state, found.digest) == (2, State.WAITING, FIRST.digest)
    assert next_name(desk) == "second"
    desk.store.mark(SECOND.digest, State.ENDED, "done", round_number=2)
    assert next_name(desk) == "first"
    desk.store.mark(FIRST.digest, State.ENDED, "done", round_number=2)
    assert desk.next() is None


def test_the_same_study_again_changes_nothing(desk: Desk) -> None:
    desk.submit(submission(FIRST))
    desk.store.mark(FIRST.digest, State.ENDED, "done", round_number=2)
    assert desk.submit(submission(FIRST)).state is State.ENDED
    assert len(desk.store.entries()) == 1


def test_what_was_submitted_is_there_for_every_later_process_with_its_signature(desk: Desk, tmp_path: Path) -> None:
    desk.submit(submission(FIRST))
    entry = StudyStore(tmp_path / "state").entry(FIRST.digest)
    assert entry.study == FIRST
    assert verify(Signed(Document.STUDY, entry.study.canonical(), entry.signature)) == FIRST.canonical()


def test_a_submission_that_was_cut_short_does_not_count(desk: Desk, tmp_path: Path) -> None:
    desk.submit(submission(FIRST))
    (tmp_path / "state" / "studies" / FIRST.digest / "record.json").unlink()  # killed before it was written
    assert desk.store.entries() == []
    assert desk.submit(submission(FIRST)).number == 1


def test_a_damaged_file_is_told_and_not_forgotten(desk: Desk, tmp_path: Path) -> None:
    desk.submit(submission(FIRST))
    (tmp_path / "state" / "studies" / FIRST.digest / "record.json").write_text("{")
    with pytest.raises(ConfigError, match="restore it from a backup"):
        desk.store.entries()


def test_nothing_is_kept_that_is_not_signed_or_could_never_run(desk: Desk) -> None:
    forged = Signed(Document.STUDY, FIRST.canonical(), bytes(64))
    with pytest.raises(PolicyRefusal):
        desk.submit(Submission(signed=forged.to_bytes().decode(), by=BY))
    with pytest.raises(ConfigError, match="never run"):
        desk.submit(submission(classes_study(strategy={"name": "krum"}, rounds={"minimum_sites": 7, "count": 1})))
    with pytest.raises(ProtocolError):
        desk.submit(Submission(signed="{}", by=BY))
    assert desk.store.entries() == []


def test_a_study_that_was_running_when_the_coordinator_was_killed_is_next(desk: Desk) -> None:
    for study in (FIRST, SECOND):
        desk.submit(submission(study))
    desk.store.mark(SECOND.digest, State.RUNNING)
    assert next_name(desk) == "second"


def test_a_waiting_study_stops_at_once_and_goes_on_when_asked(desk: Desk) -> None:
    desk.submit(submission(FIRST))
    assert desk.stop(Named(digest=FIRST.digest, by=BY)).state is State.STOPPED
    assert desk.next() is None
    with pytest.raises(ConfigError, match="stopped already"):
        desk.stop(Named(digest=FIRST.digest, by=BY))
    assert desk.resume(Named(digest=FIRST.digest, by=BY)).state is State.WAITING
    assert next_name(desk) == "first"
    with pytest.raises(ConfigError, match="waiting already"):
        desk.resume(Named(digest=FIRST.digest, by=BY))


def test_a_finished_study_neither_stops_nor_goes_on_and_one_without_quorum_may(desk: Desk) -> None:
    desk.submit(submission(FIRST))
    desk.store.mark(FIRST.digest, State.ENDED, "done", round_number=2)
    for verb in (desk.stop, desk.resume):
        with pytest.raises(ConfigError):
            verb(Named(digest=FIRST.digest, by=BY))
    desk.store.mark(FIRST.digest, State.ENDED, "too few sites took part", round_number=1)
    assert desk.resume(Named(digest=FIRST.digest, by=BY)).state is State.WAITING


def test_a_running_study_is_told_to_end_and_nothing_else_is(desk: Desk) -> None:
    for study in (FIRST, SECOND):
        desk.submit(submission(study))
    process = threading.Event()
    with desk.turn_of(desk.store.entry(FIRST.digest), process) as to_end:
        assert desk.store.entry(FIRST.digest).record.state is State.RUNNING
        assert not to_end.is_set()
        desk.stop(Named(digest=FIRST.digest, by=BY))
        assert to_end.is_set()
        assert to_end.by_a_person
        assert not process.is_set()
        with pytest.raises(ConfigError, match="just being stopped"):
            desk.resume(Named(digest=FIRST.digest, by=BY))
    assert desk.store.entry(SECOND.digest).record.state is State.WAITING


def test_a_process_that_is_to_end_ends_its_study_without_stopping_it() -> None:
    process = threading.Event()
    stop = StudyStop(process)
    threading.Timer(0.05, process.set).start()
    began = time.monotonic()
    assert stop.wait(30)
    assert time.monotonic() - began < 25
    assert not stop.by_a_person
    assert not StudyStop(threading.Event()).wait(0.01)


def report(number: int, seconds: float) -> RoundReport:
    return RoundReport(number, seconds, {"north": "trained"}, {"loss": 0.5}, {"loss": 0.4, "accuracy": 0.75})


def test_progress_is_told_by_the_studys_own_files_and_time_left_by_its_last_rounds(desk: Desk, tmp_path: Path) -> None:
    study = classes_study(rounds={"count": 10})
    desk.submit(submission(study))
    folder = run_folder(tmp_path / "runs", study)
    folder.mkdir(parents=True)
    metrics = MetricsFile(folder / "metrics.jsonl")
    for number, seconds in ((1, 100.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)):
        metrics.finished_round(report(number, seconds))
    desk.store.mark(study.digest, State.RUNNING)
    found = progress_of(desk.store.entry(study.digest), tmp_path / "runs")
    assert (found.round, found.rounds, found.loss) == (6, 10, 0.5)
    assert found.seconds_left == 8.0  # four rounds of the last five's mean, 2 s
    assert found.sites == {"north": "trained"}
    (folder / "ending.json").write_text(json.dumps({"ending": "done", "round": 10, "model": "ab" * 32}))
    desk.store.mark(study.digest, State.ENDED, "done", round_number=10)
    found = progress_of(desk.store.entry(study.digest), tmp_path / "runs")
    assert (found.round, found.model, found.seconds_left) == (10, "ab" * 32, None)


def test_a_study_that_goes_on_has_not_ended(tmp_path: Path) -> None:
    folder = begin_folder(tmp_path / "runs", FIRST)
    assert folder == run_folder(tmp_path / "runs", FIRST)
    (folder / "ending.json").write_text(json.dumps({"ending": "stopped", "round": 3, "model": "ab" * 32}))
    (folder / "series.json").write_text("{}")
    begin_folder(tmp_path / "runs", FIRST)
    assert [path.name for path in folder.iterdir()] == ["series.json"]


def test_what_runs_shows_who_refuses_and_why(desk: Desk) -> None:
    desk.submit(submission(FIRST))
    with desk.turn_of(desk.store.entry(FIRST.digest), threading.Event()):
        desk.live.waiting(["north", "south"], ["north"], 2, {"south": "refused: study not approved"})
        (found,) = desk.table(Nothing()).studies
        assert found.refusals == {"south": "refused: study not approved"}
        assert found.doing == "waiting for sites: 1 of 2 take part"
        desk.live.stage(1, "training", ["north"], ["north", "south"])
        (found,) = desk.table(Nothing()).studies
        assert found.sites == {"north": "done", "south": "training"}
    (found,) = desk.table(Nothing()).studies
    assert found.doing == ""


def test_the_socket_does_the_same(desk: Desk, tmp_path: Path) -> None:
    with AdminSocket(tmp_path / "state") as admin:
        desk.serve(admin)
        assert ask(tmp_path / "state", SUBMIT, submission(FIRST)).study == "first"
        table = ask(tmp_path / "state", LIST, Nothing())
        assert [found.digest for found in table.studies] == [FIRST.digest]
        assert table.running
        forged = Submission(signed=Signed(Document.STUDY, SECOND.canonical(), bytes(64)).to_bytes().decode(), by=BY)
        with pytest.raises(PolicyRefusal):
            ask(tmp_path / "state", SUBMIT, forged)


def test_a_study_is_named_by_its_name_or_the_beginning_of_its_digest() -> None:
    twin = classes_study(name="first", seed=1)
    assert named(FIRST.digest[:6], [FIRST, SECOND, twin]) is FIRST
    assert named("second", [FIRST, SECOND, twin]) is SECOND
    with pytest.raises(ConfigError, match="2 studies are called first"):
        named("first", [FIRST, SECOND, twin])
    for given in ("third", FIRST.digest[:3], hashlib.sha256(b"").hexdigest()):
        with pytest.raises(ConfigError, match="no study here"):
            named(given, [FIRST, SECOND])
