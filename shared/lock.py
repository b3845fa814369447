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
def only_one(state_dir: Path) -> Iterator[None]:
    """Hold ``state_dir`` while the block runs. The kernel lets go when the process dies, however it dies.

    Raises:
        ConfigError: another process holds it.
    """
    descriptor = os.open(private_folder(state_dir) / "lock", os.O_CREAT | os.O_RDWR, PRIVATE_FILE)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{state_dir} is in use by another process: stop it, or choose another folder") from None
        yield
    finally:
        os.close(descriptor)
