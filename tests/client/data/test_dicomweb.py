"""DICOMweb: a bearer token is read again when it is renewed, and refused when others could read it; pages end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pydicom
import pytest
from dicom_lab import ct
from pydantic import ValidationError

from medfl.client.data.dicomweb import DicomwebArchive, dicomweb
from medfl.client.data.pacs import Pace, RemoteSeries, Store
from medfl.client.data.settings import DicomwebSettings
from medfl.shared.errors import ConfigError, NetworkError

QUERY = {"modality": "CT"}


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """Answers every search with no studies, and remembers who asked; "expired" is refused."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            who = self.headers.get("Authorization", "")
            self.server.seen.append(who)  # type: ignore[attr-defined]
            self.send_response(401 if "expired" in who else 200)
            self.send_header("Content-Type", "application/dicom+json")
            self.end_headers()
            self.wfile.write(json.dumps([]).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    listening.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield listening
    listening.shutdown()
    thread.join()
    listening.server_close()


def settings(server: ThreadingHTTPServer, folder: Path, token: str = "first", mode: int = 0o600) -> DicomwebSettings:
    path = folder / "token"
    path.write_text(token + "\n")
    path.chmod(mode)
    fields = {"source": "dicomweb", "url": f"http://127.0.0.1:{server.server_port}/dicom-web", "token_file": path}
    return DicomwebSettings.model_validate(fields | {"query": QUERY, "fetch": {"folder": folder / "spool"}})


def test_a_token_that_is_renewed_is_used_at_the_next_request(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    wanted = settings(server, tmp_path)
    with dicomweb(wanted) as archive:
        assert list(archive.find()) == []
        (tmp_path / "token").write_text("second")
        assert list(archive.find()) == []
    assert server.seen == ["Bearer first", "Bearer second"]  # type: ignore[attr-defined]


def test_a_token_that_the_archive_refuses_is_named_and_not_shown(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    wanted = settings(server, tmp_path, "expired")
    with pytest.raises(NetworkError, match=r"401 over DICOMweb: check data\.token_file$"), dicomweb(wanted) as archive:
        list(archive.find())


@pytest.mark.parametrize(
    ("token", "mode", "reason"),
    [("first", 0o644, "chmod 600"), ("two words", 0o600, "does not hold"), ("", 0o600, "does not hold")],
)
def test_a_token_file_that_cannot_be_trusted_is_refused(
    token: str, mode: int, reason: str, server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    with (
        pytest.raises(ConfigError, match=f"data.token_file: .*{reason}") as caught,
        dicomweb(settings(server, tmp_path, token, mode)) as archive,
    ):
        list(archive.find())
    assert "first" not in str(caught.value)
    assert server.seen == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"url": "http://pacs.example/dicom-web"}, "must begin with https"), ({"user": "me"}, "two ways to sign in")],
)
def test_a_token_needs_tls_and_no_password_beside_it(changes: dict[str, str], reason: str, tmp_path: Path) -> None:
    fields = {"source": "dicomweb", "url": "https://pacs.example/dicom-web", "token_file": tmp_path / "token"}
    with pytest.raises(ValidationError, match=reason):
        DicomwebSettings.model_validate(fields | {"query": QUERY, "fetch": {"folder": tmp_path}} | changes)


class Beginner:
    """A client of a PACS that answers every search from the beginning: it knows no offset, and a limit or none."""

    def __init__(self, studies: int = 0, instances: int = 0, limits: bool = False) -> None:
        self.studies, self.instances, self.limits = studies, instances, limits
        self.searches = 0

    def _page(self, tag: str, count: int, limit: int) -> list[dict[str, Any]]:
        self.searches += 1
        assert self.searches < 10, "no end"
        shown = min(count, limit) if self.limits else count
        return [{tag: {"vr": "UI", "Value": [f"1.2.{number}"]}} for number in range(shown)]

    def search_for_studies(self, *, limit: int, **_: object) -> list[dict[str, Any]]:
        return self._page("0020000D", self.studies, limit)

    def search_for_series(self, study: str, **_: object) -> list[dict[str, Any]]:
        return [{"0020000E": {"vr": "UI", "Value": [study + ".1"]}, "00080060": {"vr": "CS", "Value": ["CT"]}}]

    def search_for_instances(self, *_: str, limit: int, offset: int) -> list[dict[str, Any]]:
        return self._page("00080018", self.instances, limit)

    def retrieve_instance(self, *_: object, **__: object) -> pydicom.FileDataset:
        return ct()[0]


def archive(client: Beginner, folder: Path, **query: object) -> DicomwebArchive:
    fields = {
        "source": "dicomweb",
        "url": "http://127.0.0.1:1",
        "fetch": {"folder": folder, "instances_per_minute": 10**9},
    }
    return DicomwebArchive(client, DicomwebSettings.model_validate(fields | {"query": QUERY | query}))  # type: ignore[arg-type]


@pytest.mark.parametrize("limits", [False, True])
def test_a_search_ends_at_an_archive_that_always_begins_again_and_finds_each_study_once(
    limits: bool, tmp_path: Path
) -> None:
    found = list(archive(Beginner(studies=200, limits=limits), tmp_path).find())
    assert len(found) == len({series.series for series in found}) == 200
    assert len(list(archive(Beginner(studies=200, limits=limits), tmp_path, max_studies=7).find())) == 7


def test_a_series_of_more_than_a_page_ends_at_an_archive_that_always_begins_again(tmp_path: Path) -> None:
    client = Beginner(instances=250)
    opened = archive(client, tmp_path)
    series = RemoteSeries("1.2", "1.2.1", "P1", 250)
    store = Store.of(tmp_path, series)
    opened.fetch(series, store, Pace(opened.settings.fetch, datetime.now, lambda seconds: None, lambda: 0.0))
    assert (len(store), client.searches) == (250, 2)
