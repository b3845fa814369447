"""Files that are whole or absent, whatever is killed: write beside, fsync, rename, fsync the folder."""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


def write_whole(path: Path, content: bytes | memoryview, *, mode: int = PRIVATE_FILE) -> None:
    """Replace ``path`` by ``content`` in one step that survives a crash at any instant.

    Raises:
        OSError: the disk is full or read-only; ``path`` is then as it was.
    """
    with _written_beside(path, content, mode) as beside:
        os.replace(beside, path)
    sync_folder(path.parent)


def create_whole(path: Path, content: bytes | memoryview, *, mode: int = PRIVATE_FILE) -> None:
    """As :func:`write_whole`, where nothing is at ``path``: whoever looks sees no file, or all of it.

    Raises:
        FileExistsError: something is there; it stays. OSError: the disk is full or read-only; nothing is there then.
    """
    with _written_beside(path, content, mode) as beside:
        try:
            os.link(beside, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():  # on a file system without links there is no step that does both
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            os.replace(beside, path)
    sync_folder(path.parent)


@contextmanager
def _written_beside(path: Path, content: bytes | memoryview, mode: int) -> Iterator[Path]:
    """A synced file with ``content`` in the folder of ``path``; afterwards it is gone."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    sweep(path)
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield beside
    finally:
        beside.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what killed processes left of their attempts at ``path``, ``.NAME.PID.part`` or ``.NAME.ANY.PID.part``.

    Of a model, each would be its size again; of a secret, a second one.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and int(pid) != os.getpid() and not Path(f"/proc/{pid}").exists():
            left.unlink(missing_ok=True)


def append_whole(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Append ``content`` to ``path``, all of it or nothing where the disk refuses; not synced.

    Raises:
        OSError: the disk is full or read-only; ``path`` is then as it was.
    """
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, mode), "wb", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(content):
                written += file.write(content[written:])
        except OSError:
            file.truncate(before)
            raise


def sync_folder(folder: Path) -> None:
    """Make renames and new files in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_folder(path: Path) -> Path:
    """Create ``path`` (and its parents) for the owner only, and return it."""
    for folder in reversed((path, *path.parents)):  # mkdir(parents=True) would leave the parents open to others
        folder.mkdir(exist_ok=True, mode=PRIVATE_FOLDER)
    return path
