"""Keep a local copy of what the site's PACS has for a query: gently, resuming where it stopped."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from math import inf
from pathlib import Path
from typing import Protocol, TypeVar

from medfl.client.data.case import Findings
from medfl.client.data.headers import Progress
from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import DicomwebSettings, DimseSettings, FetchSettings
from medfl.client.trouble import in_words
from medfl.shared.errors import DataError, NetworkError

LABEL_MODALITIES = frozenset({"SEG", "RTSTRUCT"})
_COMPLETE = ".complete"
_LEFT_BEHIND_S = 3600  # an instance is written within seconds: what is older is of a process that was killed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RemoteSeries:
    """A series that the PACS has. ``instances`` is None where it does not say how many."""

    study: str = field(repr=False)
    series: str = field(repr=False)
    patient: str = field(repr=False)
    instances: int | None


class Archive(Protocol):
    """One open connection to a PACS."""

    def find(self) -> Iterator[RemoteSeries]:
        """Series of the query's modality in the studies that match, and label objects in the same studies.

        Raises:
            NetworkError: the PACS cannot be reached, refuses, or stops in the middle.
        """

    def fetch(self, series: RemoteSeries, store: Store, pace: Pace) -> None:
        """Put every instance that ``store`` does not have into it, no faster than ``pace`` allows.

        Raises:
            NetworkError: as :meth:`find`.
            OutsideHours: the allowed hours have ended.
        """


class OutsideHours(Exception):
    """The PACS may not be asked at this time of the day."""


@dataclass(slots=True)
class Pace:
    """When the next instance may come, over all series of a fetch."""

    fetch: FetchSettings
    now: Callable[[], datetime]
    sleep: Callable[[float], None]
    clock: Callable[[], float]
    each: Callable[[int], None] = lambda count: None  # told before each instance how many have come
    _next: float = 0.0
    _count: int = 0

    def check_hours(self) -> None:
        """Raise OutsideHours unless the PACS may be asked now."""
        if not _allowed(self.fetch, self.now()):
            raise OutsideHours

    def wait(self, longest: float = inf) -> None:
        """Return when another instance may come, but after ``longest`` seconds; what is left is waited for later."""
        self.each(self._count)
        self._count += 1
        moment = self.clock()
        if self._next > moment:
            self.sleep(min(self._next - moment, longest))
        self._next = max(self._next, moment) + 60 / self.fetch.instances_per_minute


@contextmanager
def _local() -> Iterator[None]:
    """What this machine's disk refuses as a DataError: it is not the network's failure, and no use to try again."""
    try:
        yield
    except OSError as error:
        known = in_words(error)
        raise DataError(
            f"data.fetch.folder cannot be used ({error.strerror or type(error).__name__}): free or repair the disk, or "
            "correct its permissions. What was fetched is kept, the next start goes on",
            reason=known.reason if known else "",
        ) from None


@dataclass(frozen=True, slots=True)
class Store:
    """The folder of one series. Names tell nothing; a file is there whole or not at all.

    Each of its functions raises DataError where the disk is full or fails.
    """

    folder: Path = field(repr=False)

    @classmethod
    def of(cls, root: Path, series: RemoteSeries) -> Store:
        """The store of ``series`` under ``root``, made when it is not there, without what a killed process left."""
        folder = root / _name(series.series)
        with _local():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in folder.glob(".*"):
                with suppress(FileNotFoundError):  # another process that fetches has given it its name
                    if left.name != _COMPLETE and time.time() - left.stat().st_mtime > _LEFT_BEHIND_S:
                        left.unlink()
        return cls(folder)

    def has(self, instance: str) -> bool:
        """Whether the SOP instance is here."""
        with _local():
            return (self.folder / _name(instance)).exists()

    def put(self, instance: str, content: bytes) -> None:
        """Keep one DICOM file."""
        temporary = self.folder / f".{secrets.token_hex(8)}"
        with _local():
            try:
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.replace(temporary, self.folder / _name(instance))
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def __len__(self) -> int:
        with _local():
            return sum(not path.name.startswith(".") for path in self.folder.iterdir())

    def is_complete(self, series: RemoteSeries) -> bool:
        """Whether all that the PACS announced has been fetched."""
        with _local():
            return (self.folder / _COMPLETE).exists() and series.instances in (None, len(self))

    def complete(self) -> None:
        """Remember that everything is here."""
        with _local():
            (self.folder / _COMPLETE).touch(mode=0o600)


def _name(uid: str) -> str:
    return hashlib.sha256(uid.encode()).hexdigest()[:32]


def fetch_all(
    settings: DicomwebSettings | DimseSettings,
    key: SiteKey,
    findings: Findings,
    opted_out: Callable[[str], bool],
    progress: Progress | None = None,
    *,
    now: Callable[[], datetime] = datetime.now,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Bring the local copy (``settings.fetch.folder``) up to date. What is there already is not fetched again.

    Outside the allowed hours nothing is asked of the PACS and the copy is used as it is.

    Raises:
        NetworkError: the PACS failed ``attempts`` times in a row; what was fetched is kept, the next start goes on.
        DataError: outside the allowed hours and nothing has been fetched yet, or the disk is full or fails.
    """
    fetch = settings.fetch
    with _local():
        fetch.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _allowed(fetch, now()):
        if not any(fetch.folder.iterdir()):
            raise DataError(
                f"nothing has been fetched yet, and the PACS may be asked only at {fetch.hours} (data.fetch)"
            )
        findings.quarantined["not looked for in the PACS: outside the allowed hours"] += 1
        return
    tell = progress or (lambda what, done, total: None)
    tell("asking the PACS", 0, 1)
    wanted = _retry(fetch, sleep, lambda: _find(settings))
    done = 0
    pace = Pace(fetch, now, sleep, clock, lambda count: tell(f"fetching series ({count} files)", done, len(wanted)))
    for done, series in enumerate(wanted):
        tell("fetching series", done, len(wanted))
        if opted_out(key.pseudonym(series.patient)):
            findings.quarantined["opted out"] += 1
            continue
        store = Store.of(fetch.folder, series)
        if store.is_complete(series):
            continue
        try:
            pace.check_hours()
            _retry(fetch, sleep, lambda store=store, series=series: _fetch(settings, series, store, pace))  # type: ignore[misc]
        except OutsideHours:
            findings.quarantined["not fetched: outside the allowed hours"] += len(wanted) - done
            break
        store.complete()
    tell("fetching series", len(wanted), len(wanted))


def _open(settings: DicomwebSettings | DimseSettings) -> AbstractContextManager[Archive]:
    match settings:
        case DicomwebSettings():
            from medfl.client.data.dicomweb import dicomweb

            return dicomweb(settings)
        case DimseSettings():
            from medfl.client.data.dimse import dimse

            return dimse(settings)


def _find(settings: DicomwebSettings | DimseSettings) -> list[RemoteSeries]:
    with _open(settings) as archive:
        return list(archive.find())


def _fetch(settings: DicomwebSettings | DimseSettings, series: RemoteSeries, store: Store, pace: Pace) -> None:
    with _open(settings) as archive:
        archive.fetch(series, store, pace)
    if not len(store) or (series.instances is not None and len(store) < series.instances):
        raise NetworkError(f"the PACS sent {len(store)} of {series.instances} instances of a series")


def _retry(fetch: FetchSettings, sleep: Callable[[float], None], action: Callable[[], T]) -> T:
    for attempt in range(1, fetch.attempts):
        try:
            return action()
        except NetworkError:
            sleep(min(60.0, 2.0**attempt))
    return action()


def _allowed(fetch: FetchSettings, moment: datetime) -> bool:
    """Whether the PACS may be asked at ``moment``; hours may run over midnight."""
    if fetch.hours is None:
        return True
    start, _, end = fetch.hours.partition("-")
    now = moment.strftime("%H:%M")
    return start <= now < end if start <= end else now >= start or now < end
