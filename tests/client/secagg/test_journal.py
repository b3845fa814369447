"""The journal survives being killed, keeps secrets sealed, and does not take its own loss for a fresh start."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from secagg_world import MODEL, STUDY, Consortium

from medfl.client.secagg.journal import ConsumedRound, History, Journal
from medfl.shared.errors import ConfigError, DataError
from medfl.shared.secagg.announcement import Purpose

WORLD = Consortium(3)
CONTEXT = WORLD.announcement().context()


def history(journal: Journal, model: bytes = MODEL, training: int = 0) -> History:
    return journal.history(WORLD.announcement(model=model, training=training), epoch=1)


def test_a_new_journal_knows_nothing(tmp_path: Path) -> None:
    found = history(Journal(tmp_path / "secagg"))
    assert found == History((-1, -1), -1, (), None, found.key)


def test_everything_is_there_after_opening_it_again(tmp_path: Path) -> None:
    announcement = WORLD.announcement(round=5, attempt=2)
    journal = Journal(tmp_path)
    journal.begin(announcement, weight=70, epoch=1)
    journal.consume(announcement, survivors=b"\1\0\2\0", contribution=b"u" * 32, secret=b"shares")
    key = history(journal).key
    journal.close()
    again = Journal(tmp_path)
    assert history(again) == History((5, 2), 5, (ConsumedRound(5, b"\1\0\2\0", b"u" * 32),), 70, key)
    assert history(again, model=b"other" * 6 + b"..").repeated == ()
    assert again.kept(announcement.context()) == b"shares"


def test_each_journal_has_a_secret_key_of_its_own_for_fingerprints(tmp_path: Path) -> None:
    one, other = history(Journal(tmp_path / "one")), history(Journal(tmp_path / "other"))
    assert len(one.key) == 32
    assert one.key != other.key
    assert one.key != (tmp_path / "one" / "journal.key").read_bytes()[-32:]  # that one encrypts
    assert one.key.hex() not in repr(one)


def test_a_weight_is_written_once_an_epoch(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    world = Consortium(3)
    for number, weight in enumerate((70, 60)):
        journal.begin(world.announcement(round=number), weight=weight, epoch=1)
    assert history(journal).weight_ceiling == 70
    assert journal.history(world.announcement(), epoch=2).weight_ceiling is None


def test_what_is_kept_goes_when_the_next_round_of_its_purpose_begins(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.keep(WORLD.announcement(), b"shares")
    journal.begin(WORLD.announcement(purpose=Purpose.EVALUATE), weight=1, epoch=1)
    assert journal.kept(CONTEXT) == b"shares"  # the coordinator may not have saved the model yet
    journal.begin(WORLD.announcement(round=2), weight=1, epoch=1)
    assert journal.kept(CONTEXT) is None


def test_a_study_is_forgotten_on_request(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.keep(WORLD.announcement(), b"shares")
    journal.forget(b"\x33" * 32)
    assert journal.kept(CONTEXT) == b"shares"
    journal.forget(STUDY)
    assert journal.kept(CONTEXT) is None


def test_secrets_are_not_on_the_disk_in_clear(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.keep(WORLD.announcement(), b"a secret share that must not be readable")
    assert all(b"secret share" not in file.read_bytes() for file in tmp_path.iterdir())


def test_its_files_are_for_the_owner_only(tmp_path: Path) -> None:
    Journal(tmp_path / "secagg")
    files = list((tmp_path / "secagg").iterdir())
    assert {file.name for file in files} == {"journal.key", "journal.sqlite"}
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert stat.S_IMODE((tmp_path / "secagg").stat().st_mode) == 0o700


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    (tmp_path / "journal.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Journal(tmp_path)


@pytest.mark.parametrize("loss", ["missing", "empty"])
def test_a_lost_journal_is_not_taken_for_a_new_one(tmp_path: Path, loss: str) -> None:
    Journal(tmp_path).close()
    file = tmp_path / "journal.sqlite"
    file.unlink() if loss == "missing" else file.write_bytes(b"")
    with pytest.raises(DataError, match="restore the state folder"):
        Journal(tmp_path)


def test_a_damaged_journal_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    (tmp_path / "journal.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(DataError, match="restore the state folder"):
        Journal(tmp_path)


def test_another_key_does_not_open_what_is_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.keep(WORLD.announcement(), b"shares")
    journal.close()
    (tmp_path / "journal.key").write_bytes(bytes(32))
    with pytest.raises(DataError, match="does not fit its key file"):
        Journal(tmp_path).kept(CONTEXT)


def test_what_is_kept_opens_under_its_own_context_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.keep(WORLD.announcement(), b"shares")
    with journal._transaction() as run:
        run("UPDATE open_rounds SET context=?", b"d" * 32)
    with pytest.raises(DataError):
        journal.kept(b"d" * 32)


def test_a_journal_of_an_earlier_release_knows_its_rounds_and_takes_new_ones(tmp_path: Path) -> None:
    journal, first = Journal(tmp_path), WORLD.announcement()
    journal.consume(first, survivors=b"\1\0\2\0", contribution=b"u" * 32, secret=b"")
    journal.close()
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as database:  # which did not note the round of training
        database.execute("ALTER TABLE consumed DROP COLUMN training")
    again = Journal(tmp_path)
    assert [row.contribution for row in history(again).repeated] == [b"u" * 32]
    later = replace(first, round=2, model=b"n" * 32, training=7)
    again.consume(later, survivors=b"\1\0\2\0", contribution=b"v" * 32, secret=b"")
    assert [row.round for row in history(again, model=b"m" * 32, training=7).repeated] == [2]


@pytest.mark.parametrize("damaged", [b"", b"half of it", bytes(33)])
def test_a_key_file_that_is_no_key_is_told_with_the_way_out(tmp_path: Path, damaged: bytes) -> None:
    Journal(tmp_path).close()
    (tmp_path / "journal.key").write_bytes(damaged)
    with pytest.raises(DataError, match=r"journal\.key is damaged: restore the state folder"):
        Journal(tmp_path)


@pytest.mark.parametrize("made", ["an empty file", "all but the key"])
def test_a_journal_that_was_killed_while_it_was_made_starts_anew(tmp_path: Path, made: str) -> None:
    if made == "an empty file":
        (tmp_path / "journal.sqlite").touch(0o600)
    else:
        Journal(tmp_path).close()
        (tmp_path / "journal.key").unlink()
    Journal(tmp_path).begin(Consortium(3).announcement(), weight=1, epoch=1)


def test_a_journal_that_lost_its_key_forgets_no_round_and_only_cannot_finish_the_open_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(WORLD.announcement(), weight=70, epoch=1)
    journal.consume(WORLD.announcement(), survivors=b"\1\0\2\0", contribution=b"u" * 32, secret=b"shares")
    before, mark = history(journal), journal.mark(STUDY)
    journal.close()
    (tmp_path / "journal.key").unlink()
    again = Journal(tmp_path)
    after = history(again)
    assert after == replace(before, key=after.key)
    assert after.key != before.key  # so a repetition of that round is refused until it is trained anew
    assert again.mark(STUDY) == mark
    assert again.kept(CONTEXT) is None


def test_a_damaged_journal_without_its_key_is_not_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(DataError, match="restore the state folder"):
        Journal(tmp_path)


def test_a_round_is_consumed_although_the_process_is_killed_right_after(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2] / "secagg")!r})
from dataclasses import replace
from pathlib import Path
from secagg_world import Consortium
from medfl.client.secagg.journal import Journal
journal = Journal(Path({str(tmp_path)!r}))
for number in range(1000):
    announcement = Consortium(3).announcement(round=number)
    journal.begin(announcement, weight=1, epoch=1)
    journal.consume(announcement, survivors=b"", contribution=b"", secret=b"")
    print(number, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(5)][-1]
    os.kill(process.pid, signal.SIGKILL)
    told = max([told, *map(int, process.stdout.read().split())])
    process.wait()
    process.stdout.close()
    after = history(Journal(tmp_path))
    assert told <= after.last_consumed <= after.last_seen[0]


def test_a_mark_counts_what_is_answered_of_a_study_and_tells_one_journal_from_another(tmp_path: Path) -> None:
    journal, other = Journal(tmp_path / "one"), Journal(tmp_path / "two")
    announcement = WORLD.announcement()
    assert journal.mark(STUDY).rows == 0
    assert journal.mark(STUDY).digest != other.mark(STUDY).digest
    journal.begin(announcement, weight=1, epoch=1)
    journal.keep(announcement, b"shares")
    journal.consume(announcement, survivors=b"\1\0\2\0", contribution=b"u" * 32, secret=b"shares")
    journal.begin(WORLD.announcement(study=b"other" * 6 + b".."), weight=1, epoch=1)
    assert journal.mark(STUDY).rows == 2  # begun, consumed
    mark = journal.mark(STUDY)
    journal.close()
    assert Journal(tmp_path / "one").mark(STUDY) == mark


def test_what_was_forgotten_is_not_left_on_the_disk_even_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect

    def careless(*where: Any, **how: Any) -> sqlite3.Connection:  # some builds of SQLite overwrite by default, not all
        database = connect(*where, **how)
        database.execute("PRAGMA secure_delete = OFF")
        return database

    monkeypatch.setattr(sqlite3, "connect", careless)
    journal = Journal(tmp_path)
    journal.keep(WORLD.announcement(), b"shares" * 1_000)
    (sealed,) = journal._database.execute("SELECT sealed FROM open_rounds").fetchone()
    file = tmp_path / "journal.sqlite"
    assert sealed[-200:] in file.read_bytes()
    journal.forget(STUDY)
    assert sealed[-200:] not in file.read_bytes()


def test_every_commit_waits_for_the_disk_also_for_the_folder(tmp_path: Path) -> None:
    (level,) = Journal(tmp_path)._database.execute("PRAGMA synchronous").fetchone()
    assert level == 3  # EXTRA: https://www.sqlite.org/pragma.html#pragma_synchronous


def test_an_entry_that_fails_leaves_nothing_of_itself_and_the_next_one_is_written(tmp_path: Path) -> None:
    journal, announcement = Journal(tmp_path), WORLD.announcement(round=5)
    with pytest.raises(DataError, match="cannot be used"):
        journal.consume(announcement, survivors=object(), contribution=b"u" * 32, secret=b"")  # type: ignore[arg-type]
    assert journal.mark(STUDY).rows == 0
    journal.begin(announcement, weight=70, epoch=1)
    assert history(journal).last_seen == (5, 0)


def test_a_closed_journal_cannot_be_used(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.close()
    with pytest.raises(DataError, match="cannot be used"):
        journal.mark(STUDY)
