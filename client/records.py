"""What a site remembers between messages: its studies, its own scores, its personal tensors."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from medfl.client.data.secret import SiteKey, open_site_key
from medfl.shared.errors import DataError, PolicyRefusal, ProtocolError
from medfl.shared.files import PRIVATE_FILE, private_folder, sync_folder, write_whole
from medfl.shared.messages import TrainReply
from medfl.shared.study import Study
from medfl.shared.weights import Flat

CACHE_KEY = "cache.key"
"""In the study's folder: opens the images that were cached for it, and nothing else."""


class Records(Protocol):
    """A site's memory. Whether it survives a restart is for the implementation to say."""

    def remember(self, study: Study) -> None:
        """Keep ``study``."""
        ...

    def study(self, digest: str) -> Study | None:
        """The study of that digest, or None when it was never offered here."""
        ...

    def forget(self, digest: str) -> None:
        """Delete what was made of patients for a withdrawn study, and keep no more of it. The site's rows stay."""
        ...

    def take_up(self, digest: str) -> None:
        """Keep again what is made for a study that was withdrawn, now that it is approved."""
        ...

    def keep_initial(self, digest: str, content: bytes) -> None:
        """Keep the file of the weights a study begins with."""
        ...

    def initial(self, digest: str) -> bytes | None:
        """The file of the weights a study begins with, or None."""
        ...

    def note(self, digest: str, row: dict[str, Any]) -> None:
        """Append one row to the site's own metrics of a study."""
        ...

    def keep_personal(self, digest: str, weights: Flat, *, asked: str = "", counted: int | None = None) -> None:
        """Replace what stays at the site of a study: personal tensors, a control variate.

        ``asked`` ("round/digest of the weights") is what made it; ``counted`` as :meth:`personal` was asked.
        """
        ...

    def personal(self, digest: str, *, asked: str = "", counted: int | None = None) -> Flat | None:
        """What stays at the site of a study, or None.

        What stood before instead, where it was made by ``asked`` itself, or in a round later than ``counted``, the last
        whose answer is in the coordinator's model (None: that does not matter).
        """
        ...

    def keep_answer(self, digest: str, asked: str, reply: TrainReply) -> None:
        """Keep the last training's result of a study, by what was asked."""
        ...

    def answer(self, digest: str, asked: str) -> TrainReply | None:
        """The kept result, when it is the one to ``asked``."""
        ...


class MemoryRecords:
    """Records of a virtual site: gone with the process."""

    def __init__(self) -> None:
        self._studies: dict[str, Study] = {}
        self._initial: dict[str, bytes] = {}
        self._personal: dict[str, tuple[str, Flat, Flat | None]] = {}  # asked, what stays, what stood before
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def take_over(self, other: MemoryRecords) -> None:
        """Hold what ``other`` holds."""
        self.__dict__.update(other.__dict__)

    def remember(self, study: Study) -> None:
        """Keep ``study``."""
        self._studies[study.digest] = study

    def study(self, digest: str) -> Study | None:
        """The study of that digest, or None."""
        return self._studies.get(digest)

    def forget(self, digest: str) -> None:
        """Let the personal tensors go."""
        self._personal.pop(digest, None)

    def take_up(self, digest: str) -> None:
        """Nothing: what is made is kept in any case."""

    def keep_initial(self, digest: str, content: bytes) -> None:
        """Keep the file of the weights a study begins with."""
        self._initial[digest] = content

    def initial(self, digest: str) -> bytes | None:
        """The file of the weights a study begins with, or None."""
        return self._initial.get(digest)

    def note(self, digest: str, row: dict[str, Any]) -> None:
        """Append one row to the metrics of a study."""
        self.rows.setdefault(digest, []).append(row)

    def keep_personal(self, digest: str, weights: Flat, *, asked: str = "", counted: int | None = None) -> None:
        """Replace the personal tensors of a study; what stood before is kept only where it may be asked for."""
        before = None if counted is None else self.personal(digest, asked=asked, counted=counted)
        self._personal[digest] = (asked, weights, before)

    def personal(self, digest: str, *, asked: str = "", counted: int | None = None) -> Flat | None:
        """The personal tensors of a study, or None; those before where the last answer was not counted."""
        made_by, weights, before = self._personal.get(digest, ("", None, None))
        return before if counted is not None and _undone(made_by, asked, counted) else weights

    def keep_answer(self, digest: str, asked: str, reply: TrainReply) -> None:
        """Nothing: hundreds of virtual sites would keep hundreds of models, and their coordinator loses no reply."""

    def answer(self, digest: str, asked: str) -> TrainReply | None:
        """Nothing is kept."""
        return None


class FolderRecords:
    """Records on the site's disk: ``studies/DIGEST/{study.json, metrics.jsonl, personal.safetensors}``, owner only."""

    def __init__(self, folder: Path) -> None:
        self._folder = private_folder(folder / "studies")
        self._studies: dict[str, Study] = {}
        self._forgotten: set[str] = set()
        self._writing = threading.Lock()  # of what may have to be deleted from another thread

    def remember(self, study: Study) -> None:
        """Keep ``study`` durably."""
        write_whole(private_folder(self._of(study.digest)) / "study.json", study.canonical())
        self._studies[study.digest] = study

    def forget(self, digest: str) -> None:
        """Delete personal tensors, the last result, and the key of the study's cache, which no longer opens then."""
        with self._writing:
            self._forgotten.add(digest)
            for name in ("personal.safetensors", "answer.safetensors", CACHE_KEY):
                (self._of(digest) / name).unlink(missing_ok=True)
            if self._of(digest).is_dir():
                sync_folder(self._of(digest))

    def take_up(self, digest: str) -> None:
        """Keep again what is made for a study that was withdrawn, under another key."""
        with self._writing:
            self._forgotten.discard(digest)

    def cache_key(self, digest: str) -> SiteKey:
        """The key of the study's cache, made where there is none yet.

        Raises:
            ConfigError: it cannot be read or made. PolicyRefusal: the study was withdrawn just now.
        """
        with self._writing:
            if digest in self._forgotten:
                raise PolicyRefusal("the study was withdrawn here: no images are read for it", reason="study withdrawn")
            return open_site_key(private_folder(self._of(digest)) / CACHE_KEY)

    def study(self, digest: str) -> Study | None:
        """The study of that digest, or None. A damaged file counts as absent: the coordinator offers again."""
        if digest not in self._studies:
            try:
                content = (self._of(digest) / "study.json").read_bytes()
                self._studies[digest] = Study.from_canonical(content, digest=digest)
            except (OSError, ProtocolError):
                return None
        return self._studies[digest]

    def keep_initial(self, digest: str, content: bytes) -> None:
        """Keep the file of the weights a study begins with, durably."""
        write_whole(private_folder(self._of(digest)) / "initial.safetensors", content)

    def initial(self, digest: str) -> bytes | None:
        """The file of the weights a study begins with, or None."""
        try:
            return (self._of(digest) / "initial.safetensors").read_bytes()
        except OSError:
            return None

    def note(self, digest: str, row: dict[str, Any]) -> None:
        """Append one row to the study's ``metrics.jsonl``."""
        path = private_folder(self._of(digest)) / "metrics.jsonl"
        path.touch(mode=PRIVATE_FILE)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def keep_personal(self, digest: str, weights: Flat, *, asked: str = "", counted: int | None = None) -> None:
        """Replace the study's personal tensors, atomically, beside what stood before ``asked`` was answered.

        So a round that is trained again, because the site was killed before its answer was kept, starts where it did.
        """
        before = self.personal(digest, asked=asked, counted=counted)
        tensors = {"weights": weights} | ({} if before is None else {"before": before})
        self._write(digest, "personal.safetensors", save(tensors, metadata={"asked": asked}))

    def personal(self, digest: str, *, asked: str = "", counted: int | None = None) -> Flat | None:
        """The study's personal tensors, or None where none were kept yet."""
        path = self._of(digest) / "personal.safetensors"
        try:
            with safe_open(path, framework="numpy") as file:
                undone = _undone((file.metadata() or {}).get("asked", ""), asked, counted)
                if undone and "before" not in file.keys():  # noqa: SIM118 - not a mapping
                    return None
                weights = file.get_tensor("before" if undone else "weights")
        except FileNotFoundError:
            return None
        except Exception:  # safetensors raises its own untyped errors
            raise DataError(
                "the site's personal tensors of this study cannot be read: restore the state folder from its backup, "
                "or remove the study's folder below state/studies to start them anew"
            ) from None
        return np.asarray(weights, dtype=np.float32)

    def keep_answer(self, digest: str, asked: str, reply: TrainReply) -> None:
        """Replace the study's last result, atomically."""
        about = {"asked": asked, "examples": reply.examples, "tally": dict(reply.tally)}
        self._write(digest, "answer.safetensors", save({"update": reply.update}, metadata={"medfl": json.dumps(about)}))

    def answer(self, digest: str, asked: str) -> TrainReply | None:
        """The study's last result when it is the one to ``asked``. A damaged file counts as absent: it is retrained."""
        try:
            with safe_open(self._of(digest) / "answer.safetensors", framework="numpy") as file:
                about = json.loads((file.metadata() or {})["medfl"])
                if about["asked"] != asked:
                    return None
                return TrainReply(file.get_tensor("update"), about["examples"], about["tally"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def _write(self, digest: str, name: str, content: bytes) -> None:
        with self._writing:
            if digest not in self._forgotten:
                write_whole(private_folder(self._of(digest)) / name, content)

    def _of(self, digest: str) -> Path:
        return self._folder / digest


def _undone(made_by: str, asked: str, counted: int | None) -> bool:
    """Whether what ``made_by`` left does not stand: it is asked again, or its answer never got into the model."""
    return bool(made_by) and (made_by == asked or (counted is not None and int(made_by.partition("/")[0]) > counted))
