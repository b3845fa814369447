"""What is known of files that have not changed: their header and their content's digest, so that a restart is quick."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medfl.client.data.cache import EncryptedCache
from medfl.client.data.case import Quarantine
from medfl.client.data.guard import unreachable
from medfl.client.data.headers import Header

_ADDRESS = "file memo"


@dataclass(slots=True)
class FileMemo:
    """Facts by path, valid while size, times and inode of the file stay as they were. Kept in the encrypted cache."""

    cache: EncryptedCache
    context: str  # whatever else headers depend on; with another, they are read again
    _facts: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    _changed: bool = False

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
            self.cache.put(_ADDRESS, json.dumps(self._facts).encode())

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
            self._changed = True
            facts["context"] = self.context
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
            self._changed = True
            facts["digest"] = content_digest(path)
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
