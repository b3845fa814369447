"""Signing in to DICOMweb with a bearer token: read again when it is renewed, refused when others could read it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import ValidationError

from medfl.client.data.dicomweb import dicomweb
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
