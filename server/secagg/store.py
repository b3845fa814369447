"""What the coordinator must not forget: which round and attempt it announced, and the sum it was about to unmask."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medfl.server.secagg.pending import PendingSum
from medfl.shared.errors import DataError, ProtocolError
from medfl.shared.files import private_folder, write_whole
from medfl.shared.secagg.announcement import Announcement, Purpose
from medfl.shared.secagg.encoding import Encoding
from medfl.shared.secagg.messages import KeyList

log = logging.getLogger("medfl.server")


class Store(Protocol):
    """The coordinator's memory for secure sums. Whether it outlives the process is for the implementation to say."""

    def begin(self, study: bytes, purpose: Purpose, *, ahead: int = 1) -> int:
        """A round number that was never announced for ``study`` and ``purpose``; forgets their earlier pending sum.

        It is so far ``ahead`` of the last one.
        """
        ...

    def keep(self, pending: PendingSum) -> None:
        """Keep ``pending`` until the next :meth:`begin` of its study and purpose, or :meth:`forget`."""
        ...

    def pending(self, study: bytes, purpose: Purpose = Purpose.TRAIN) -> PendingSum | None:
        """The sum kept for ``study`` and ``purpose``: a fresh copy, to be finished."""
        ...

    def forget(self, study: bytes) -> None:
        """Drop the study's pending sums: their results are safe elsewhere, or given up."""
        ...


class MemoryStore:
    """A store that is gone with the process, for simulations: a process that is gone cannot go on."""

    def __init__(self) -> None:
        self._rounds: dict[tuple[bytes, Purpose], int] = {}

    def begin(self, study: bytes, purpose: Purpose, *, ahead: int = 1) -> int:
        """The next round number."""
        number = self._rounds.get((study, purpose), 0) + ahead
        self._rounds[study, purpose] = number
        return number

    def keep(self, pending: PendingSum) -> None:
        """Keep nothing."""

    def pending(self, study: bytes, purpose: Purpose = Purpose.TRAIN) -> PendingSum | None:
        """None."""
        return None

    def forget(self, study: bytes) -> None:
        """Nothing is kept."""


class FolderStore:
    """A store on disk: ``STUDY/{rounds.json, PURPOSE.json, PURPOSE.vector}``; each write is durable when it returns."""

    def __init__(self, folder: Path) -> None:
        self._folder = private_folder(folder)

    def begin(self, study: bytes, purpose: Purpose, *, ahead: int = 1) -> int:
        """The next round number, on disk before it is used.

        Raises:
            DataError: the file of round numbers is damaged: a guessed number would be refused as a replay.
        """
        self._drop(study, purpose)
        path = private_folder(self._of(study)) / "rounds.json"
        try:
            rounds = {Purpose(int(key)): int(number) for key, number in json.loads(path.read_bytes()).items()}
        except FileNotFoundError:
            rounds = {}
        except (OSError, ValueError, TypeError, AttributeError):
            raise DataError(
                f"{path} cannot be read: restore it from the backup; its numbers may be too high, never too low"
            ) from None
        rounds[purpose] = rounds.get(purpose, 0) + ahead
        write_whole(path, json.dumps({str(key.value): number for key, number in rounds.items()}).encode())
        return rounds[purpose]

    def keep(self, pending: PendingSum) -> None:
        """Keep ``pending``: first its vector, then the file that names it. Memory stays at one model."""
        folder = private_folder(self._of(pending.announcement.study))
        name = pending.announcement.purpose.name.lower()
        write_whole(folder / f"{name}.vector", pending.vector.view(np.uint8).data)
        content: dict[str, Any] = {
            "announcement": pending.announcement.to_bytes().hex(),
            "encoding": pending.encoding.to_bytes().hex(),
            "key_list": pending.key_list.to_bytes().hex(),
            "commitments": {str(site): commitment.hex() for site, commitment in pending.commitments.items()},
            "survivors": pending.survivors,
            "scalars": pending.scalars.tobytes().hex(),
            "vector": _digest(pending.vector),
        }
        write_whole(folder / f"{name}.json", json.dumps(content).encode())

    def pending(self, study: bytes, purpose: Purpose = Purpose.TRAIN) -> PendingSum | None:
        """The sum kept, or None where there is none or it is damaged (its round is void then)."""
        folder, name = self._of(study), purpose.name.lower()
        try:
            content = json.loads((folder / f"{name}.json").read_bytes())
            encoding = Encoding.parse(bytes.fromhex(content["encoding"]))
            vector = np.fromfile(folder / f"{name}.vector", encoding.ring.dtype)
            if _digest(vector) != content["vector"]:
                raise ValueError
            return PendingSum(
                announcement=Announcement.parse(bytes.fromhex(content["announcement"])),
                encoding=encoding,
                key_list=KeyList.parse(bytes.fromhex(content["key_list"])),
                commitments={int(site): bytes.fromhex(hexed) for site, hexed in content["commitments"].items()},
                survivors=tuple(content["survivors"]),
                vector=vector,
                scalars=np.frombuffer(bytes.fromhex(content["scalars"]), np.uint64).copy(),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ProtocolError):
            log.warning("the masked sum that was to be finished is damaged on disk: its round is void")
            return None

    def forget(self, study: bytes) -> None:
        """Remove the pending sums of ``study``."""
        for purpose in Purpose:
            self._drop(study, purpose)

    def _drop(self, study: bytes, purpose: Purpose) -> None:
        for ending in ("json", "vector"):
            (self._of(study) / f"{purpose.name.lower()}.{ending}").unlink(missing_ok=True)

    def _of(self, study: bytes) -> Path:
        return self._folder / study.hex()


def _digest(vector: NDArray[Any]) -> str:
    return hashlib.sha256(vector.data).hexdigest()
