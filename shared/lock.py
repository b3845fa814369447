"""One process per state folder: two coordinators or two nodes on the same state would undo each other's work."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medfl.shared.errors import ConfigError
from medfl.shared.files import PRIVATE_FILE, private_folder


@contextmanager
def only_one(state_dir: Path, *, held: str = "") -> Iterator[None]:
    """Hold ``state_dir`` while the block runs. The kernel lets go when the process dies, however it dies.

    ``held`` is what a person is told who finds it held, where stopping the other process is wrong advice.

    Raises:
        ConfigError: another process holds it, or it is another account's.
    """
    path = state_dir / "lock"
    try:
        private_folder(state_dir)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, PRIVATE_FILE)
    except PermissionError as error:
        raise ConfigError(
            f"{path}: cannot be opened ({error.strerror}): it belongs to another account: give it and what lies "
            "beside it to the one that runs this"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = held or f"{state_dir} is in use by another process: stop it, or choose another folder"
            raise ConfigError(told) from None
        yield
    finally:
        os.close(descriptor)
