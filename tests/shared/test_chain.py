"""Rows are whole or absent after any crash; every kind of damage is noticed and named."""

import errno
import json
import os
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl.shared import chain as chains
from medfl.shared.chain import GENESIS, Chain, Head, Role, inspect
from medfl.shared.errors import PolicyRefusal

LOG = Role("ledger", "Restore the newest backup")


def written(path: Path, rows: int = 3) -> bytes:
    chain = Chain(path, LOG)
    for number in range(rows):
        chain.append({"value": number})
    chain.close()
    return path.read_bytes()


def values(path: Path) -> list[int]:
    chain = Chain(path, LOG)
    chain.close()
    return [row["value"] for row in chain.rows]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.jsonl"


def test_rows_are_there_after_reopening(path: Path) -> None:
    written(path)
    assert values(path) == [0, 1, 2]


def test_only_the_owner_can_read_the_files(path: Path) -> None:
    written(path)
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


def test_each_row_names_the_hash_of_the_one_before(path: Path) -> None:
    rows = [json.loads(line) for line in written(path).splitlines()]
    assert [row["previous"] for row in rows] == [GENESIS, rows[0]["hash"], rows[1]["hash"]]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 10_000))
def test_a_last_row_torn_anywhere_is_completed(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("torn") / "ledger.jsonl"
    content = written(path)
    last = len(content.splitlines()[-1]) + 1
    path.write_bytes(content[: -1 - cut % last])
    assert values(path) == [0, 1, 2]
    assert path.read_bytes() == content


def test_a_row_that_was_announced_and_not_yet_written_is_completed(path: Path) -> None:
    content = written(path)
    path.write_bytes(b"".join(content.splitlines(keepends=True)[:-1]))
    assert values(path) == [0, 1, 2]


def test_the_very_first_row_torn_is_completed(path: Path) -> None:
    content = written(path, rows=1)
    path.write_bytes(content[:10])
    assert values(path) == [0]


Damage = Callable[[list[bytes]], list[bytes]]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "edited": (lambda rows: [rows[0], rows[1].replace(b'"value":1', b'"value":9'), rows[2]], "row 2 is not as it was"),
    "reformatted": (lambda rows: [rows[0].replace(b",", b", "), *rows[1:]], "row 1 is not as it was"),
    "removed from the middle": (lambda rows: [rows[0], rows[2]], "row 2 is not as it was"),
    "removed from the start": (lambda rows: rows[1:], "row 1 is not as it was"),
    "exchanged": (lambda rows: [rows[1], rows[0], rows[2]], "row 1 is not as it was"),
    "truncated": (lambda rows: rows[:1], "it has 1 whole rows, and row 3 was written last"),
    "emptied": (lambda rows: [], "it has 0 whole rows, and row 3 was written last"),
    "garbage": (lambda rows: [*rows, b"\x00\xff"], "row 4 is torn and was never announced"),
    "repeated": (lambda rows: [*rows, rows[2]], "row 4 is not as it was"),
    "torn and changed": (lambda rows: [*rows[:2], rows[2][:20] + b"x"], "row 3 is torn and differs"),
    "torn in the middle": (lambda rows: [rows[0], rows[1][:20] + b"\n", rows[2]], "row 2 is not as it was"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_and_named(name: str, path: Path) -> None:
    damage, message = DAMAGES[name]
    path.write_bytes(b"".join(damage(written(path).splitlines(keepends=True))))
    damaged = path.read_bytes()
    with pytest.raises(PolicyRefusal, match=message) as refusal:
        Chain(path, LOG)
    assert refusal.value.reason == "ledger damaged"
    assert path.read_bytes() == damaged  # evidence is kept


def test_a_row_rewritten_with_a_fitting_hash_breaks_the_next_one(path: Path) -> None:
    first, *others = written(path).splitlines(keepends=True)
    row = {**json.loads(first), "value": 7}
    row["hash"] = chains._digest(row)
    path.write_bytes(b"".join([chains._line(row), *others]))
    with pytest.raises(PolicyRefusal, match="row 2 does not follow row 1"):
        Chain(path, LOG)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"not json"])
def test_a_missing_or_broken_announcement_is_refused(content: bytes | None, path: Path) -> None:
    written(path)
    announcement = path.with_name("ledger.jsonl.head")
    announcement.unlink() if content is None else announcement.write_bytes(content)
    with pytest.raises(PolicyRefusal, match=r"ledger.jsonl.head is (missing|not as it was)"):
        Chain(path, LOG)


def test_a_second_process_is_kept_out_until_the_first_closes(path: Path) -> None:
    first = Chain(path, LOG)
    with pytest.raises(PolicyRefusal, match="another process") as refusal:
        Chain(path, LOG)
    assert refusal.value.reason == "ledger busy"
    first.close()
    Chain(path, LOG).close()


def test_a_disk_that_fills_up_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(path)
    chain = Chain(path, LOG)
    real_write = os.write

    def half_then_full(descriptor: int, data: bytes) -> int:
        if len(data) > 40:
            return real_write(descriptor, data[:40])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(chains.os, "write", lambda fd, data: half_then_full(fd, data[:-1]))
    with pytest.raises(PolicyRefusal, match="No space left on device") as refusal:
        chain.append({"value": 3})
    assert refusal.value.reason == "ledger unwritable"
    assert [row["value"] for row in chain.rows] == [0, 1, 2]
    monkeypatch.undo()
    chain.append({"value": 4})  # space was made
    chain.close()
    assert values(path) == [0, 1, 2, 4]


def test_a_disk_that_is_full_from_the_start_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(path)
    chain = Chain(path, LOG)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(chains, "write_whole", full)
    with pytest.raises(PolicyRefusal, match="No space left on device"):
        chain.append({"value": 3})
    chain.close()
    monkeypatch.undo()
    assert values(path) == [0, 1, 2]


def test_when_not_even_the_torn_row_can_be_removed_the_chain_stops(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(path)
    chain = Chain(path, LOG)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(chains.os, "write", broken)
    monkeypatch.setattr(chains.os, "ftruncate", broken)
    for _ in range(2):
        with pytest.raises(PolicyRefusal, match="cannot be written"):
            chain.append({"value": 3})
        monkeypatch.undo()
    chain.close()
    assert values(path) == [0, 1, 2, 3]  # announced: counted, although nothing was released under it


def test_a_clock_that_jumps_back_is_written_down_and_time_does_not_run_backwards(path: Path) -> None:
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    times = iter([now, now - timedelta(days=400), now + timedelta(hours=1)])
    chain = Chain(path, LOG, clock=lambda: next(times))
    first, second, third = (chain.append({"value": number}) for number in range(3))
    chain.close()
    assert second["time"] == first["time"]
    assert second["clock_said"].startswith("2025-01-25")
    assert third["time"].startswith("2026-03-01T13")
    assert "clock_said" not in third


def test_an_older_head_is_held_and_a_foreign_or_newer_one_is_not(path: Path) -> None:
    chain = Chain(path, LOG)
    heads = [chain.head]
    for number in range(2):
        chain.append({"value": number})
        heads.append(chain.head)
    chain.close()
    assert [head.rows for head in heads] == [0, 1, 2]
    assert all(chain.holds(head) for head in heads)
    assert not chain.holds(Head(1, heads[2].digest))
    assert not chain.holds(Head(3, heads[2].digest))
    assert not chain.holds(Head(3, ""))
    assert not chain.holds(Head(0, heads[2].digest))


def test_an_inspection_finds_what_opening_refuses_and_gives_the_rows_before_it(path: Path) -> None:
    content = written(path)
    assert inspect(path).problem is None
    assert [row["value"] for row in inspect(path).rows] == [0, 1, 2]
    for damage, message in DAMAGES.values():
        path.write_bytes(b"".join(damage(content.splitlines(keepends=True))))
        found = inspect(path)
        assert message in (found.problem or "")
        assert [row["value"] for row in found.rows] == list(range(len(found.rows)))


def test_an_inspection_needs_no_lock_and_counts_a_row_that_is_being_written_without_writing_it(path: Path) -> None:
    content = written(path)
    holder = Chain(path, LOG)
    assert inspect(path).head == holder.head
    path.write_bytes(content[:-20])
    assert inspect(path).head == holder.head
    assert path.read_bytes() == content[:-20]
    holder.close()


def test_an_inspection_looks_again_while_rows_are_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(path)
    writer = Chain(path, LOG)
    looked = []

    def late(seen: Path) -> bytes | None:  # two rows are written between the look at the announcement and at the file
        content = seen.read_bytes()
        if not looked:
            writer.append({"value": 3})
            writer.append({"value": 4})
        looked.append(seen)
        return content

    monkeypatch.setattr(chains, "_bytes_of", late)
    found = inspect(path)
    assert found.problem is None
    assert found.head == writer.head
    writer.close()


def test_a_chain_that_keeps_no_rows_goes_on_and_knows_its_older_heads(path: Path) -> None:
    written(path)
    kept = Chain(path, LOG)
    heads = [Head(number, row["hash"]) for number, row in enumerate(kept.rows, start=1)]
    kept.close()
    chain = Chain(path, LOG, keep_rows=False)
    chain.append({"value": 3})
    assert chain.rows == []
    assert all(chain.holds(head) for head in heads)
    chain.close()
    assert values(path) == [0, 1, 2, 3]


def test_opening_and_examining_a_long_chain_takes_little_memory(path: Path) -> None:
    chain = Chain(path, LOG, keep_rows=False)
    chain.append_all([{"value": "x" * 1000}] * 2000)
    chain.append({"value": 0})
    chain.close()
    seen: list[int] = []
    tracemalloc.start()
    try:
        Chain(path, LOG, keep_rows=False, look=lambda row: seen.append(row["row"])).close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen == list(range(1, 2002))
    assert peak < path.stat().st_size / 8  # 2.3 MB; of each row 32 bytes stay


def test_an_inspection_is_of_one_moment_although_rows_are_written_while_it_reads(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(path)
    writer, parse = Chain(path, LOG), chains._parsed

    def slow(line: bytes) -> chains.Row | None:
        if writer.head.rows < 20:
            writer.append({"value": writer.head.rows})
        return parse(line)

    monkeypatch.setattr(chains, "_parsed", slow)
    monkeypatch.setattr(chains, "_LOOKS", 1)
    found = inspect(path)
    writer.close()
    assert (found.problem, found.head.rows) == (None, 3)


def test_a_row_and_its_announcement_are_fsynced_whole_before_appending_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, fsync = Chain(path, LOG), os.fsync
    synced: list[tuple[int, int]] = []

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        state = os.fstat(descriptor)
        synced.append((state.st_ino, state.st_size))

    monkeypatch.setattr(chains.os, "fsync", noted)
    chain.append({"value": 0})
    monkeypatch.undo()
    chain.close()
    announced = path.with_name("ledger.jsonl.head").stat()
    assert {(path.stat().st_ino, path.stat().st_size), (announced.st_ino, announced.st_size)} <= set(synced)


def batches(path: Path) -> bytes:
    chain = Chain(path, LOG)
    chain.append_all([{"value": 0}])
    chain.append_all([{"value": 1}, {"value": 2}, {"value": 3}])
    chain.close()
    return path.read_bytes()


def test_several_rows_are_written_with_one_announcement_and_chained_like_single_ones(path: Path) -> None:
    rows = [json.loads(line) for line in batches(path).splitlines()]
    assert [row["previous"] for row in rows] == [GENESIS, *(row["hash"] for row in rows[:-1])]
    assert values(path) == [0, 1, 2, 3]
    chain = Chain(path, LOG)
    assert chain.append_all([]) == []
    chain.close()
    assert values(path) == [0, 1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000))
def test_several_rows_torn_anywhere_are_completed(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("torn") / "ledger.jsonl"
    content = batches(path)
    first = content.index(b"\n") + 1
    path.write_bytes(content[: first + cut % (len(content) - first)])
    assert [row["value"] for row in inspect(path).rows] == [0, 1, 2, 3]
    assert values(path) == [0, 1, 2, 3]
    assert path.read_bytes() == content


def test_an_announcement_of_several_rows_that_are_missing_or_changed_is_noticed(path: Path) -> None:
    first, *others = batches(path).splitlines(keepends=True)
    path.write_bytes(b"")
    assert "it has 0 whole rows, and row 4 was written last" in (inspect(path).problem or "")
    path.write_bytes(b"".join([first, *others]))
    announcement = path.with_name("ledger.jsonl.head")
    announcement.write_bytes(b"".join([others[0], others[2]]))
    assert "is not as it was written" in (inspect(path).problem or "")
    row = {**json.loads(others[0]), "value": 7}
    row["hash"] = chains._digest(row)
    announcement.write_bytes(chains._line(row))
    assert "row 2 was written last" in (inspect(path).problem or "")
