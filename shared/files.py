"""Files that are whole or absent, whatever is killed: write beside, fsync, rename, fsync the folder."""

from __future__ import annotations

import os
from pathlib import Path

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700


def write_whole(path: Path, content: bytes, *, mode: int = PRIVATE_FILE) -> None:
    """Replace ``path`` by ``content`` in one step that survives a crash at any instant.

    Raises:
        OSError: the disk is full or read-only; ``path`` is then as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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
