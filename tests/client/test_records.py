from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import classes_study

from medfl.client.records import FolderRecords, MemoryRecords, Records
from medfl.shared.errors import DataError
from medfl.shared.messages import TrainReply

STUDY = classes_study()
WEIGHTS = np.array([1 / 3, -0.0, 3e38], np.float32)
MAKE: list[Callable[[Path], Records]] = [lambda path: MemoryRecords(), FolderRecords]


@pytest.mark.parametrize("make", MAKE)
def test_what_was_never_kept_is_none(make: Callable[[Path], Records], tmp_path: Path) -> None:
    records = make(tmp_path)
    assert records.study(STUDY.digest) is None
    assert records.personal(STUDY.digest) is None
    assert records.answer(STUDY.digest, "1/x") is None


@pytest.mark.parametrize("make", MAKE)
def test_what_was_kept_comes_back_bit_for_bit(make: Callable[[Path], Records], tmp_path: Path) -> None:
    records = make(tmp_path)
    records.remember(STUDY)
    records.keep_personal(STUDY.digest, WEIGHTS)
    assert records.study(STUDY.digest) == STUDY
    personal = records.personal(STUDY.digest)
    assert personal is not None
    assert personal.tobytes() == WEIGHTS.tobytes()


def test_an_answer_is_kept_for_the_very_request_it_answered(tmp_path: Path) -> None:
    records = FolderRecords(tmp_path)
    records.keep_answer(STUDY.digest, "1/x", TrainReply(WEIGHTS, 5, {"loss": 1.5}))
    answer = records.answer(STUDY.digest, "1/x")
    assert answer is not None
    assert (answer.update.tobytes(), answer.examples, answer.tally) == (WEIGHTS.tobytes(), 5, {"loss": 1.5})
    assert records.answer(STUDY.digest, "2/x") is None


def test_records_on_disk_survive_a_restart(tmp_path: Path) -> None:
    before = FolderRecords(tmp_path)
    before.remember(STUDY)
    before.keep_personal(STUDY.digest, WEIGHTS)
    before.keep_answer(STUDY.digest, "1/x", TrainReply(WEIGHTS, 5))
    after = FolderRecords(tmp_path)
    assert after.study(STUDY.digest) == STUDY
    assert after.personal(STUDY.digest) is not None
    assert after.answer(STUDY.digest, "1/x") is not None


def test_records_are_for_their_owner_only(tmp_path: Path) -> None:
    records = FolderRecords(tmp_path / "state")
    records.remember(STUDY)
    records.note(STUDY.digest, {"round": 1})
    records.keep_personal(STUDY.digest, WEIGHTS)
    records.keep_answer(STUDY.digest, "1/x", TrainReply(WEIGHTS, 5))
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert len([path for path in modes if path.is_file()]) == 4


def test_scores_are_one_json_line_each(tmp_path: Path) -> None:
    records = FolderRecords(tmp_path)
    records.note(STUDY.digest, {"round": 1})
    records.note(STUDY.digest, {"round": 2})
    lines = (tmp_path / "studies" / STUDY.digest / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]


def test_a_damaged_study_counts_as_absent(tmp_path: Path) -> None:
    FolderRecords(tmp_path).remember(STUDY)
    path = tmp_path / "studies" / STUDY.digest / "study.json"
    path.write_bytes(path.read_bytes().replace(b"tiny", b"tinx"))
    assert FolderRecords(tmp_path).study(STUDY.digest) is None


def test_damaged_personal_tensors_are_told_and_not_started_anew_in_silence(tmp_path: Path) -> None:
    records = FolderRecords(tmp_path)
    records.keep_personal(STUDY.digest, WEIGHTS)
    (tmp_path / "studies" / STUDY.digest / "personal.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="restore the state folder"):
        records.personal(STUDY.digest)


@pytest.mark.parametrize("content", [b"", b"damaged", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_answer_counts_as_absent(tmp_path: Path, content: bytes) -> None:
    records = FolderRecords(tmp_path)
    records.keep_answer(STUDY.digest, "1/x", TrainReply(WEIGHTS, 5))
    (tmp_path / "studies" / STUDY.digest / "answer.safetensors").write_bytes(content)
    assert FolderRecords(tmp_path).answer(STUDY.digest, "1/x") is None


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_what_an_uncounted_answer_left_is_taken_back(kind: str, tmp_path: Path) -> None:
    records = FolderRecords(tmp_path) if kind == "folder" else MemoryRecords()
    records.remember(STUDY)

    def kept(counted: int) -> float | None:
        found = records.personal(STUDY.digest, asked="9/z", counted=counted)
        return None if found is None else float(found[0])

    records.keep_personal(STUDY.digest, np.array([1], np.float32), asked="1/a", counted=0)
    assert (kept(counted=1), kept(counted=0)) == (1.0, None)
    records.keep_personal(STUDY.digest, np.array([2], np.float32), asked="2/b", counted=1)
    assert (kept(counted=2), kept(counted=1)) == (2.0, 1.0)
    records.keep_personal(STUDY.digest, np.array([3], np.float32), asked="3/c", counted=1)  # the answer of 2 was late
    assert (kept(counted=3), kept(counted=1)) == (3.0, 1.0)
