"""What a site must never forget, even when killed: which rounds it has answered, and how to finish the open one.

SQLite, because it is the one well-kept store in the standard library that commits atomically through a power cut.
What is needed to finish an open round is encrypted with a key file beside it, and deleted when the next round begins.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from medfl.shared.chain import Head
from medfl.shared.errors import DataError
from medfl.shared.files import PRIVATE_FILE, private_folder
from medfl.shared.keys import read_private, write_new
from medfl.shared.secagg.announcement import Announcement, Purpose
from medfl.shared.secagg.hashing import derive_key
from medfl.shared.secagg.reasons import Reason

_SCHEMA = """
CREATE TABLE journal (id BLOB);
INSERT INTO journal VALUES (randomblob(32));
CREATE TABLE marks (study BLOB PRIMARY KEY, rows INTEGER);
CREATE TABLE seen (study BLOB, purpose INTEGER, round INTEGER, attempt INTEGER, PRIMARY KEY (study, purpose));
CREATE TABLE consumed (
    study BLOB, purpose INTEGER, round INTEGER, model BLOB, roster BLOB, survivors BLOB, contribution BLOB,
    training INTEGER DEFAULT 0, PRIMARY KEY (study, purpose, round));
CREATE INDEX consumed_models ON consumed (study, purpose, model);
CREATE TABLE weights (study BLOB, epoch INTEGER, weight INTEGER, PRIMARY KEY (study, epoch));
CREATE TABLE open_rounds (context BLOB PRIMARY KEY, study BLOB, purpose INTEGER, sealed BLOB);
"""
_KEY_BYTES, _NONCE_BYTES = 32, 12


@dataclass(frozen=True, slots=True)
class ConsumedRound:
    """A sum that may have become public: over these sites, with this contribution of this site."""

    round: int
    survivors: bytes  # site ids, u16 each
    contribution: bytes  # fingerprint


@dataclass(frozen=True, slots=True)
class History:
    """What the journal says about one study and purpose, and of its sums about the same model or the same round."""

    last_seen: tuple[int, int]  # (round, attempt); (-1, -1) when none
    last_consumed: int  # round; -1 when none
    repeated: tuple[ConsumedRound, ...]
    weight_ceiling: int | None  # of this study and roster epoch
    key: bytes = field(repr=False)  # of this journal's fingerprints


class Journal:
    """Durable: when a method that writes has returned, its entry survives kill -9 and a power cut."""

    def __init__(self, folder: Path | None) -> None:
        """Open or create the journal in ``folder``; None keeps it in memory, for virtual sites.

        Raises:
            DataError: the journal is damaged, missing beside its key, or cannot be written.
            ConfigError: its key file can be read by others.
        """
        self._lock = Lock()
        with _disk_errors():
            if folder is None:
                self._database, self._key = _connect(":memory:"), secrets.token_bytes(32)
                _make_tables(self._database)
            else:
                self._database, self._key = _open(private_folder(folder))

    def close(self) -> None:
        """Release the file. The journal cannot be used afterwards."""
        self._database.close()

    def mark(self, study: bytes) -> Head:
        """How many entries this journal has of ``study``, and the number that tells it from every other journal.

        Whoever remembers a mark notices when the journal is put back to an older copy, or begun anew.
        """
        with self._transaction() as run:
            (identity,) = run("SELECT id FROM journal").fetchone()
            rows = run("SELECT rows FROM marks WHERE study=?", study).fetchone()
        return Head(rows[0] if rows else 0, identity.hex())

    def history(self, announcement: Announcement, *, epoch: int) -> History:
        """What has been answered before of the announcement's study and purpose, and of its model or round.

        Patient numbers belong to one roster: with another they are counted anew.
        """
        study, purpose = announcement.study, announcement.purpose
        with self._transaction() as run:
            seen = run("SELECT round, attempt FROM seen WHERE study=? AND purpose=?", study, purpose).fetchone()
            last = run("SELECT max(round) FROM consumed WHERE study=? AND purpose=?", study, purpose).fetchone()[0]
            same = run(
                "SELECT round, survivors, contribution FROM consumed WHERE study=? AND purpose=?"
                " AND (model=? OR (training=? AND training>0)) AND (purpose<>? OR roster=?) ORDER BY round",
                study,
                purpose,
                announcement.model,
                announcement.training,
                Purpose.SETUP,
                announcement.roster,
            ).fetchall()
            weight = run("SELECT weight FROM weights WHERE study=? AND epoch=?", study, epoch).fetchone()
        return History(
            last_seen=seen or (-1, -1),
            last_consumed=-1 if last is None else last,
            repeated=tuple(ConsumedRound(*row) for row in same),
            weight_ceiling=weight[0] if weight else None,
            key=derive_key(self._key, context=b"", purpose=b"fingerprint"),
        )

    def begin(self, announcement: Announcement, *, weight: int, epoch: int) -> None:
        """Record that this attempt is answered and with which weight; forget how to finish the purpose's last round."""
        with self._transaction() as run:
            self._count(run, announcement.study)
            run("DELETE FROM open_rounds WHERE study=? AND purpose=?", announcement.study, announcement.purpose)
            run(
                "INSERT OR REPLACE INTO seen VALUES (?,?,?,?)",
                announcement.study,
                announcement.purpose,
                announcement.round,
                announcement.attempt,
            )
            if announcement.purpose is not Purpose.EVALUATE:  # where weights mean nothing
                run("INSERT OR IGNORE INTO weights VALUES (?,?,?)", announcement.study, epoch, weight)

    def keep(self, announcement: Announcement, secret: bytes) -> None:
        """Keep ``secret``, encrypted: what is needed to go on with this attempt after a restart."""
        with self._transaction() as run:
            self._keep(run, announcement, secret)

    def consume(self, announcement: Announcement, *, survivors: bytes, contribution: bytes, secret: bytes) -> None:
        """Record, in one step, that the round is consumed by a sum over ``survivors``, and replace what is kept."""
        with self._transaction() as run:
            self._count(run, announcement.study)
            run(
                "INSERT INTO consumed VALUES (?,?,?,?,?,?,?,?)",
                announcement.study,
                announcement.purpose,
                announcement.round,
                announcement.model,
                announcement.roster,
                survivors,
                contribution,
                announcement.training,
            )
            self._keep(run, announcement, secret)

    def kept(self, context: bytes) -> bytes | None:
        """What :meth:`keep` or :meth:`consume` kept for ``context``, or None.

        Raises:
            DataError: it does not open with this journal's key.
        """
        with self._transaction() as run:
            row = run("SELECT sealed FROM open_rounds WHERE context=?", context).fetchone()
        if row is None:
            return None
        try:
            return ChaCha20Poly1305(self._key).decrypt(row[0][:_NONCE_BYTES], row[0][_NONCE_BYTES:], context)
        except InvalidTag:
            raise DataError(
                "the secure-aggregation journal does not fit its key file: restore both from the same backup",
                reason=Reason.JOURNAL,
            ) from None

    def forget(self, study: bytes) -> None:
        """Delete what is kept to finish the study's open rounds."""
        with self._transaction() as run:
            run("DELETE FROM open_rounds WHERE study=?", study)

    def _count(self, run: _Run, study: bytes) -> None:
        run("INSERT INTO marks VALUES (?, 1) ON CONFLICT (study) DO UPDATE SET rows = rows + 1", study)

    def _keep(self, run: _Run, announcement: Announcement, secret: bytes) -> None:
        context, nonce = announcement.context(), secrets.token_bytes(_NONCE_BYTES)
        sealed = nonce + ChaCha20Poly1305(self._key).encrypt(nonce, secret, context)
        run(
            "INSERT OR REPLACE INTO open_rounds VALUES (?,?,?,?)",
            context,
            announcement.study,
            announcement.purpose,
            sealed,
        )

    @contextmanager
    def _transaction(self) -> Iterator[_Run]:
        with self._lock, _disk_errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield _Run(self._database)
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")


class _Run:
    """Executes one statement of the open transaction."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __call__(self, statement: str, *values: bytes | int) -> sqlite3.Cursor:
        return self._database.execute(statement, values)


def _open(folder: Path) -> tuple[sqlite3.Connection, bytes]:
    """The database and its key. The key is written last, so a key without its database is a loss and not a start.

    A database without its key may be either: it keeps what it holds.
    """
    key_file, path = folder / "journal.key", folder / "journal.sqlite"
    if key_file.exists():
        if not path.exists() or path.stat().st_size == 0:
            raise DataError(
                f"the secure-aggregation journal is missing beside {key_file}: restore the state folder from its "
                "latest backup. Only if no round has ever been answered here, remove the key file to start anew",
                reason=Reason.JOURNAL,
            )
        if len(key := read_private(key_file)) != _KEY_BYTES:
            raise DataError(
                f"{key_file} is damaged: restore the state folder from its latest backup. Without one, remove this "
                "file: what was answered stays answered, and a sum that is open cannot be finished",
                reason=Reason.JOURNAL,
            )
        database = _connect(str(path))
        if all(column != "training" for _, column, *_ in database.execute("PRAGMA table_info(consumed)")):
            database.execute("ALTER TABLE consumed ADD COLUMN training INTEGER DEFAULT 0")  # of an earlier release
        return database, key
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, PRIVATE_FILE))
    database = _connect(str(path))
    if database.execute("SELECT count(*) FROM sqlite_master WHERE name='journal'").fetchone() == (0,):
        _make_tables(database)
    else:  # a lost key, or killed between the two: what was answered stays answered; the open round cannot be finished
        database.execute("DELETE FROM open_rounds")
    key = secrets.token_bytes(_KEY_BYTES)
    write_new(key_file, key)
    return database, key


def _connect(name: str) -> sqlite3.Connection:
    database = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA synchronous = EXTRA")
    database.execute("PRAGMA secure_delete = ON")
    database.execute("SELECT count(*) FROM sqlite_master")
    return database


def _make_tables(database: sqlite3.Connection) -> None:
    database.executescript(f"BEGIN; {_SCHEMA} COMMIT;")


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise DataError(
            f"the secure-aggregation journal cannot be used ({error}): free space, or restore the state folder from "
            "its backup; nothing has left this site",
            reason=Reason.JOURNAL,
        ) from None
