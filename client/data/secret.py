"""The site's secret, from which come patients' pseudonyms, the split and the cache's key. It stays on its disk."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from medfl.shared.errors import ConfigError
from medfl.shared.files import sweep, sync_folder

KEY_BYTES = 32


@dataclass(frozen=True, slots=True, repr=False)
class SiteKey:
    """32 random bytes. Whoever deletes the file makes every pseudonym and every cached image unreadable."""

    material: bytes

    def __post_init__(self) -> None:
        if len(self.material) < KEY_BYTES:
            raise ConfigError(f"a site's secret must be at least {KEY_BYTES} bytes long, got {len(self.material)}")

    def derive(self, purpose: str) -> bytes:
        """A 32-byte key for one ``purpose``: HMAC-SHA256, so that no purpose's key tells anything of another's."""
        return hmac.digest(self.material, b"medfl/" + purpose.encode(), hashlib.sha256)

    def pseudonym(self, patient: str) -> str:
        """32 hexadecimal digits that stand for ``patient`` at this site only; case and outer spaces do not matter.

        ``patient`` may be part of a file's name that is not UTF-8, as Python gives it: the bytes count then.
        """
        name = patient.strip().upper().encode("utf-8", "surrogateescape")
        return hmac.digest(self.derive("patient"), name, hashlib.sha256).hex()[:32]


def open_site_key(path: Path) -> SiteKey:
    """Read the secret at ``path``; make it (mode 0600, on disk before return) when there is none yet.

    Raises:
        ConfigError: others can read it, it is too short, or the folder cannot be written.
    """
    try:
        _create(path)
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"{path}: the site's secret can be read by others: run chmod 600 on it")
        return SiteKey(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: the site's secret cannot be read or made ({error.strerror})") from None


def _create(path: Path) -> None:
    """Put 32 random bytes at ``path`` unless it exists. Linked in when complete: two processes agree on one secret."""
    sweep(path)  # a process killed in here may have left the secret under another name as well
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.{os.getpid()}.part")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return  # another process was first: its secret counts
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
