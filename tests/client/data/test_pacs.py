"""The local copy of a PACS when the disk or the process fails: nothing half is left, and nobody else is blamed."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from dicom_lab import KEY, ct
from pynetdicom import AE, evt
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelGet  # type: ignore[attr-defined]

from medfl.client.data.case import Findings
from medfl.client.data.dicomweb import DicomwebArchive
from medfl.client.data.dimse import dimse
from medfl.client.data.pacs import Pace, RemoteSeries, Store, fetch_all
from medfl.client.data.settings import DicomwebSettings, DimseSettings
from medfl.shared.errors import DataError

SERIES = RemoteSeries("1.2", "1.2.1", "P1", 1)
NO_SPACE = OSError(errno.ENOSPC, "No space left on device", "/spool/NAME")


def full(*_: object, **__: object) -> None:
    raise NO_SPACE


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.of(tmp_path, SERIES)


def left(store: Store) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_a_full_disk_is_told_in_words_and_leaves_nothing_half(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match=r"data\.fetch\.folder cannot be used \(No space left") as caught:
        store.put("1.2.3", b"content")
    assert (caught.value.reason, caught.value.exit_status) == ("disk full", 4)
    assert "NAME" not in str(caught.value)
    assert left(store) == []


def test_an_interruption_leaves_nothing_half(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.put("1.2.3", b"content")
    assert left(store) == []


def test_what_a_killed_process_left_is_swept_and_what_another_writes_now_stays(store: Store, tmp_path: Path) -> None:
    store.put("1.2.3", b"content")
    store.complete()
    kept = left(store)
    (store.folder / ".0123456789abcdef").write_bytes(b"half")
    (store.folder / ".fedcba9876543210").write_bytes(b"being written")
    for name in (".0123456789abcdef", ".complete"):
        os.utime(store.folder / name, (time.time() - 7200,) * 2)
    assert left(Store.of(tmp_path, SERIES)) == sorted([*kept, ".fedcba9876543210"])


def web(folder: Path) -> DicomwebSettings:
    fields = {"source": "dicomweb", "url": "http://127.0.0.1:1", "query": {"modality": "CT"}}
    return DicomwebSettings.model_validate(fields | {"fetch": {"folder": folder, "instances_per_minute": 10**9}})


def test_a_full_disk_is_not_the_networks_failure_and_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(self: DicomwebArchive) -> Iterator[RemoteSeries]:
        yield SERIES

    def fetch(self: DicomwebArchive, series: RemoteSeries, store: Store, pace: Pace) -> None:
        store.put("1.2.3", b"content")

    monkeypatch.setattr(DicomwebArchive, "find", find)
    monkeypatch.setattr(DicomwebArchive, "fetch", fetch)
    monkeypatch.setattr(os, "replace", full)
    pauses: list[float] = []
    with pytest.raises(DataError, match="No space left on device"):
        fetch_all(web(tmp_path / "spool"), KEY, Findings(), lambda patient: False, sleep=pauses.append)
    assert pauses == []
    monkeypatch.undo()
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(DataError, match="No space left on device"):
        fetch_all(web(tmp_path / "other"), KEY, Findings(), lambda patient: False)


@contextmanager
def sending(name: str) -> Iterator[int]:
    """The port of a PACS that answers every C-GET with one image."""
    image = ct(name=name)[0]

    def get(event: Any) -> Iterator[Any]:
        yield 1
        yield 0xFF00, image

    entity = AE("PACS")
    entity.add_supported_context(StudyRootQueryRetrieveInformationModelGet)
    entity.add_supported_context(image.SOPClassUID, scu_role=True, scp_role=True)
    server: Any = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_GET, get)])
    try:
        yield server.socket.getsockname()[1]
    finally:
        server.shutdown()


def received(port: int, folder: Path) -> Store:
    """The store after the series that :func:`sending` has was fetched."""
    image = ct(name="P1")[0]
    settings = DimseSettings.model_validate(
        {
            "source": "dimse", "host": "127.0.0.1", "pacs_port": port, "called_ae_title": "PACS",
            "query": {"modality": "CT"}, "fetch": {"folder": folder, "timeout_s": 5},
        }
    )  # fmt: skip
    series = RemoteSeries(image.StudyInstanceUID, image.SeriesInstanceUID, "P1", 1)
    store = Store.of(folder, series)
    pace = Pace(settings.fetch, datetime.now, lambda seconds: None, lambda: 0.0)
    with dimse(settings) as archive:
        archive.fetch(series, store, pace)
    return store


def test_a_disk_that_is_full_while_an_archive_sends_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sending("P1") as port:
        assert len(received(port, tmp_path / "good")) == 1
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(DataError, match="No space left on device"):
            received(port, tmp_path / "full")
    assert [path for path in (tmp_path / "full").rglob("*") if path.is_file()] == []
