"""A folder is one process's at a time; whoever does not get it is told which file and what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from medfl.shared.errors import ConfigError
from medfl.shared.lock import only_one


def test_who_comes_second_is_told_in_the_words_for_what_is_locked(tmp_path: Path) -> None:
    with only_one(tmp_path):
        with pytest.raises(ConfigError, match="is in use by another process: stop it"), only_one(tmp_path):
            pass
        with pytest.raises(ConfigError, match=r"^wait for it$"), only_one(tmp_path, held="wait for it"):
            pass
    with only_one(tmp_path):
        pass


def test_a_lock_of_another_account_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(ConfigError, match=r"lock: cannot be opened.*another account"), only_one(tmp_path):
        pass
