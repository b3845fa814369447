"""Preprocessed examples on disk, encrypted: addressed by what they are made of, bounded, shared by processes.

Entries are AES-256-GCM under a key that comes from the site's secret, with the address as associated data: without the
secret they are noise, and an entry that was damaged, swapped or forged does not open and is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medfl.client.data.secret import SiteKey
from medfl.shared.errors import ConfigError

_NONCE_BYTES = 12
_LARGEST = 2**31 - 1 - 64  # what one AES-GCM call of the library takes
_SUFFIX = ".enc"


@dataclass(frozen=True, slots=True)
class EncryptedCache:
    """Bytes by address. ``quota`` in bytes; the entries that were not used for longest go first."""

    folder: Path
    quota: int
    _cipher: AESGCM = field(repr=False)
    _names: bytes = field(repr=False)

    @classmethod
    def open(cls, folder: Path, key: SiteKey, quota: int) -> EncryptedCache:
        """The cache in ``folder`` (made with mode 0700).

        Raises:
            ConfigError: the folder cannot be made or written.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / ".lock").touch(mode=0o600)
        except OSError as error:
            raise ConfigError(f"{folder}: the cache's folder cannot be written ({error.strerror})") from None
        return cls(folder, quota, AESGCM(key.derive("cache")), key.derive("cache names"))

    def get(self, address: str) -> bytes | None:
        """What was put under ``address``; None where there is nothing, or nothing that opens (it is then removed)."""
        path = self._path(address)
        try:
            sealed = path.read_bytes()
            content = self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], address.encode())
            os.utime(path)  # used now
        except FileNotFoundError:
            return None
        except (InvalidTag, ValueError, OSError):
            path.unlink(missing_ok=True)
            return None
        return content

    def put(self, address: str, content: bytes) -> None:
        """Keep ``content``; when the disk is full or it is larger than the quota, silently do not."""
        if len(content) > min(self.quota, _LARGEST):
            return
        nonce = secrets.token_bytes(_NONCE_BYTES)
        temporary = self.folder / f".{secrets.token_hex(8)}"
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(nonce)
                file.write(self._cipher.encrypt(nonce, content, address.encode()))
            os.replace(temporary, self._path(address))
        except OSError:
            temporary.unlink(missing_ok=True)

    def evict(self) -> None:
        """Delete the least recently used entries until the rest fits into the quota, and files left by a crash."""
        with self._locked():
            entries = []
            for path in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another process was first
                    entries.append((path.stat(), path))
            newest = max((stat.st_mtime for stat, _ in entries), default=0.0)
            total = 0
            for stat, path in sorted(entries, key=lambda entry: -entry[0].st_mtime):
                if path.suffix != _SUFFIX:
                    if path.name != ".lock" and newest - stat.st_mtime > 3600:
                        path.unlink(missing_ok=True)
                    continue
                total += stat.st_size
                if total > self.quota:
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _path(self, address: str) -> Path:
        # Keyed, so that who knows an image's content cannot see from a name whether it is here.
        name = hmac.digest(self._names, address.encode(), hashlib.sha256).hex()
        return self.folder / f"{name}{_SUFFIX}"
