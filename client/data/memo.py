"""What is known of files that have not changed: their header and their content's digest, so that a restart is quick."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medfl.client.data.cache import EncryptedCache
from medfl.client.data.case import Quarantine
from medfl.client.data.guard import unreachable
from medfl.client.data.headers import Header

_ADDRESS = "file memo"
_SECONDS = 180  # between two times that it is saved while much is learnt
_SHARE = 0.02  # of the time, at most, goes into saving: a memo of a million files takes seconds


@dataclass(slots=True)
class FileMemo:
    """Facts by path, valid while size, times and inode of the file stay as they were. Kept in the encrypted cache."""

    cache: EncryptedCache
    context: str  # whatever else headers depend on; with another, they are read again
    _facts: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    _changed: bool = False
    _due: float = field(default_factory=lambda: time.monotonic() + _SECONDS)

    @classmethod
    def load(cls, cache: EncryptedCache, context: str) -> FileMemo:
        """The memo that was saved last; empty where there is none."""
        memo = cls(cache, context)
        content = cache.get(_ADDRESS)
        if content is not None:
            memo._facts = json.loads(content)
        return memo

    def save(self) -> None:
        """Keep what was learnt; of two processes the last one counts."""
        if self._changed:
            started = time.monotonic()
            self.cache.put(_ADDRESS, json.dumps(self._facts).encode())
            self._changed = False
            ended = time.monotonic()
            self._due = ended + max(_SECONDS, (ended - started) / _SHARE)

    def _learnt(self) -> None:
        """Save from time to time, so that a start that is interrupted does not begin again."""
        self._changed = True
        if time.monotonic() >= self._due:
            self.save()

    def header(self, path: Path, read: Callable[[Path], Header]) -> Header:
        """The header of ``path``, from ``read`` where it is not known.

        Raises:
            Quarantine: what ``read`` raised, now or, unless that was passing, when the file was seen first.
        """
        facts = self._of(path)
        if facts.get("context") != self.context:
            try:
                header = asdict(read(path))
                del header["path"]
                facts["header"] = header | {"referenced_series": sorted(header["referenced_series"])}
                facts.pop("left out", None)
            except Quarantine as reason:
                if reason.passing:
                    raise
                facts["left out"] = str(reason)
            facts["context"] = self.context
            self._learnt()
        if "left out" in facts:
            raise Quarantine(facts["left out"])
        known = facts["header"]
        return Header(
            path=path,
            **known
            | {
                "referenced_series": frozenset(known["referenced_series"]),
                "attributes": tuple((name, value) for name, value in known["attributes"]),
            },
        )

    def digest(self, path: Path) -> str:
        """Hexadecimal SHA-256 of the file's content.

        Raises:
            Quarantine: it cannot be read.
        """
        facts = self._of(path)
        if "digest" not in facts:
            facts["digest"] = content_digest(path)
            self._learnt()
        return str(facts["digest"])

    def _of(self, path: Path) -> dict[str, Any]:
        try:
            stat = path.stat()
        except OSError as error:
            raise unreachable(error) from None
        # A change time cannot be set back by ordinary means, as a modification time can.
        signature = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        facts = self._facts.setdefault(str(path), {})
        if facts.get("signature") != signature:
            facts.clear()
            facts["signature"] = signature
            self._changed = True
        return facts


def content_digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a file.

    Raises:
        Quarantine: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreachable(error) from None
