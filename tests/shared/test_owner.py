"""Who may leave files in a folder: its owner; root only where the folder is root's."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from medfl.shared.errors import ConfigError
from medfl.shared.owner import check_owner

OWNER = pwd.getpwuid(os.getuid()).pw_name


def test_the_owner_of_a_folder_may_write_there_also_before_it_is_made(tmp_path: Path) -> None:
    check_owner(tmp_path)
    check_owner(tmp_path / "state" / "roster")


@pytest.mark.parametrize("account", [0, 12345])
def test_another_account_is_told_whose_the_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: int
) -> None:
    if account == os.getuid():
        os.chown(tmp_path, 54321, 54321)
    owner = "#54321" if account == os.getuid() else OWNER
    monkeypatch.setattr(os, "geteuid", lambda: account)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=f"belongs to {owner}.*sudo -u {owner} "):
        check_owner(tmp_path / "state")


def test_an_account_that_a_shared_folder_lets_in_may_write_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    check_owner(tmp_path)
