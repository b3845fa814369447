"""What a check-in does with answers, and with a disk that takes nothing."""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path

import pytest
from certified import load_authority
from consortium import found_consortium_folder, site_settings

from medfl.client import checkin
from medfl.client.checkin import CheckIns
from medfl.client.trust import site_rosters
from medfl.shared.certificates import SiteFiles, days_left, issue_client_certificate, load_certificate
from medfl.shared.checkin import CheckedIn
from medfl.shared.enrolment import make_request
from medfl.shared.keys import load_site_key


class Answered:
    """A connection over which a renewed certificate comes."""

    def __init__(self, certificate: bytes) -> None:
        self.certificate = certificate
        self.reloaded = 0

    def check_in(self, question: bytes) -> bytes:
        return CheckedIn(time.time(), certificate=self.certificate).to_bytes()

    def reload_certificate(self) -> None:
        self.reloaded += 1


def test_on_a_full_disk_a_check_in_is_told_and_does_not_end_the_heartbeat_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found_consortium_folder(tmp_path)
    site = site_settings(tmp_path, "north")
    files = SiteFiles(site.keys)
    request, authority = make_request(files, "north"), load_authority(tmp_path / "fl")
    line = Answered(issue_client_certificate(authority, "north", request.tls_key, days=500))
    check_in = CheckIns("north", files, load_site_key(files.site_key), site_rosters(site))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/srv/secret-name")

    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR, "medfl"):
        patched.setattr(checkin, "write_whole", full)
        check_in(line)
    assert "No space left on device" in caplog.text
    assert "free or repair the disk" in caplog.text
    assert "secret-name" not in caplog.text
    assert line.reloaded == 0

    check_in(line)  # there is room again
    assert "cannot write there" not in caplog.text
    assert line.reloaded == 1
    assert days_left(load_certificate(files.certificate)) > 490


def test_keys_that_this_account_cannot_write_are_told_while_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found_consortium_folder(tmp_path)
    site = site_settings(tmp_path, "north")
    files = SiteFiles(site.keys)
    check_in = CheckIns("north", files, load_site_key(files.site_key), site_rosters(site))
    monkeypatch.setattr(os, "access", lambda path, mode: path != files.folder)  # root may write everywhere
    with caplog.at_level(logging.WARNING, "medfl"):
        check_in(Answered(b""))
        check_in(Answered(b""))
    assert caplog.text.count("cannot write there") == 1
