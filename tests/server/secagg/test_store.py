"""Round numbers never fall, and a pending sum is read back whole or not at all."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from secagg_world import STUDY, pending_sum

from medfl.server.secagg.store import FolderStore, MemoryStore
from medfl.shared.errors import DataError
from medfl.shared.secagg.announcement import Purpose


def test_rounds_rise_over_restarts_and_for_each_purpose_by_itself(tmp_path: Path) -> None:
    assert [FolderStore(tmp_path).begin(STUDY, Purpose.TRAIN) for _ in range(3)] == [1, 2, 3]
    assert FolderStore(tmp_path).begin(STUDY, Purpose.EVALUATE) == 1
    assert FolderStore(tmp_path).begin(b"\x33" * 32, Purpose.TRAIN) == 1
    assert FolderStore(tmp_path).begin(STUDY, Purpose.TRAIN) == 4


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff", b'{"1": null}', b'{"9": 1}'])
def test_a_damaged_file_of_round_numbers_is_an_error_with_a_way_out(tmp_path: Path, content: bytes) -> None:
    FolderStore(tmp_path).begin(STUDY, Purpose.TRAIN)
    (tmp_path / STUDY.hex() / "rounds.json").write_bytes(content)
    with pytest.raises(DataError, match="never too low"):
        FolderStore(tmp_path).begin(STUDY, Purpose.TRAIN)


def test_a_pending_sum_is_read_back_whole(tmp_path: Path) -> None:
    kept = pending_sum()
    FolderStore(tmp_path).keep(kept)
    read = FolderStore(tmp_path).pending(STUDY)
    assert read is not None
    assert np.array_equal(read.vector, kept.vector)
    assert np.array_equal(read.scalars, kept.scalars)
    for name in ("announcement", "encoding", "key_list", "commitments", "survivors"):
        assert getattr(read, name) == getattr(kept, name)


def test_a_damaged_pending_sum_is_none(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.keep(pending_sum())
    file = tmp_path / STUDY.hex() / "train.vector"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert store.pending(STUDY) is None


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"null", b"{}"])
def test_a_pending_sum_whose_description_is_damaged_is_none(tmp_path: Path, content: bytes) -> None:
    store = FolderStore(tmp_path)
    store.keep(pending_sum())
    (tmp_path / STUDY.hex() / "train.json").write_bytes(content)
    assert store.pending(STUDY) is None


@pytest.mark.parametrize("left", ["train.vector", "train.json"])
def test_half_a_pending_sum_is_none(tmp_path: Path, left: str) -> None:
    store = FolderStore(tmp_path)
    store.keep(pending_sum())
    for file in (tmp_path / STUDY.hex()).glob("train.*"):
        if file.name != left:
            file.unlink()
    assert store.pending(STUDY) is None


def test_a_pending_sum_is_forgotten_when_the_next_round_of_its_purpose_begins(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.keep(pending_sum())
    store.begin(STUDY, Purpose.EVALUATE)
    assert store.pending(STUDY) is not None  # scores are summed before the model is in a checkpoint
    assert store.pending(STUDY, Purpose.EVALUATE) is None
    store.begin(STUDY, Purpose.TRAIN)
    assert store.pending(STUDY) is None


def test_a_pending_sum_is_forgotten_on_request(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.keep(pending_sum())
    store.forget(STUDY)
    assert store.pending(STUDY) is None
    assert store.begin(STUDY, Purpose.TRAIN) == 1


def test_the_store_of_a_simulation_counts_and_keeps_nothing() -> None:
    store = MemoryStore()
    assert [store.begin(STUDY, Purpose.TRAIN) for _ in range(2)] == [1, 2]
    store.keep(pending_sum())
    assert store.pending(STUDY) is None


def test_a_pending_sum_is_on_the_disk_before_it_has_its_name_and_so_is_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[bool, int, bool]] = []  # (a folder, bytes of a file, whether the vector has its name)
    sync = os.fsync

    def seen(descriptor: int) -> None:
        found = os.fstat(descriptor)
        named = any(tmp_path.rglob("train.vector"))
        synced.append((stat.S_ISDIR(found.st_mode), 0 if stat.S_ISDIR(found.st_mode) else found.st_size, named))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    FolderStore(tmp_path).keep(pending_sum())
    assert any(not folder and size == 160 and not named for folder, size, named in synced)  # 40 values of 4 bytes
    vector = next(place for place, (folder, size, named) in enumerate(synced) if not folder and size == 160)
    assert any(folder and named for folder, _, named in synced[vector:])
