"""The state after a round as one atomic file, and the finished model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from medfl.server.convergence import Best
from medfl.shared.files import write_whole
from medfl.shared.study import Study
from medfl.shared.weights import Flat, Layout, weights_digest

log = logging.getLogger("medfl.server")

_STATE = "strategy."
_AVERAGE = "average"
_GOOD = "good."
_UNREADABLE = (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class Metrics:
    """What a round told, except its scores, which are asked for once it is safe."""

    outcomes: Mapping[str, str] = field(default_factory=dict)  # site -> a word
    training: Mapping[str, float] = field(default_factory=dict)  # sums over all sites
    received_bytes: int = 0
    best: Best | None = None  # held-out score of the rounds before


@dataclass(frozen=True)
class Checkpoint:
    """Everything needed to go on after ``round``: global weights, strategy memory, Flower's run series."""

    study: str  # digest
    round: int
    weights: Flat
    strategy: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    series: int | None = None
    average: Flat | None = None  # mean of the last rounds' models, where the study asks for one and it has begun
    answers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # what is remembered of each site
    epoch: int | None = None  # of the roster, where sums are secure
    metrics: Metrics = field(default_factory=Metrics)
    watch: Mapping[str, Any] = field(default_factory=dict)  # of the safeguards: numbers, and the model to go back to
    good: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


class CheckpointFolder:
    """The two latest checkpoints of a study; the older one is used where the newer is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._newest, self._previous = folder / "checkpoint.safetensors", folder / "checkpoint.previous.safetensors"
        self._evaluated = folder / "evaluated.json"
        self._damaged = False  # the newest, as the last load found it

    def save(self, checkpoint: Checkpoint) -> None:
        """Write durably; the last one becomes the previous one. Raises OSError when the disk refuses."""
        tensors = {"weights": checkpoint.weights} | {_STATE + name: a for name, a in checkpoint.strategy.items()}
        tensors |= {_GOOD + name: array for name, array in checkpoint.good.items()}
        if checkpoint.average is not None:
            tensors[_AVERAGE] = checkpoint.average
        about: dict[str, Any] = {
            "study": checkpoint.study,
            "round": checkpoint.round,
            "series": checkpoint.series,
            "answers": checkpoint.answers,
            "epoch": checkpoint.epoch,
            "metrics": asdict(checkpoint.metrics),
            "watch": checkpoint.watch,
        }
        about["digest"] = _digest(tensors, about)
        content = save(tensors, metadata={"medfl": json.dumps(about)})
        if self._newest.exists():
            if self._damaged:
                self._newest.unlink()  # or it would take the place of the good one
            else:
                self._newest.replace(self._previous)
        write_whole(self._newest, content)
        self._damaged = False

    def load(self, study: Study) -> Checkpoint | None:
        """The latest readable checkpoint of ``study``, or None where there is none."""
        for path in (self._newest, self._previous):
            if not path.exists():
                continue
            checkpoint = _read(path)
            if checkpoint is None:
                self._damaged |= path == self._newest
                log.warning("checkpoint %s is damaged: the one before it is tried", path.name)
            elif checkpoint.study == study.digest:
                return checkpoint
        return None

    def save_best(self, study: str, round_number: int, weights: Flat) -> None:
        """Keep the model with the best score; the one before it goes when :meth:`mark_evaluated` notes the score."""
        tensors, about = {"weights": weights}, {"study": study, "round": round_number}
        content = save(tensors, metadata={"medfl": json.dumps(about | {"digest": _digest(tensors, about)})})
        write_whole(self._best(round_number), content)

    def load_best(self, study: str, round_number: int) -> Flat | None:
        """The model of this round that :meth:`save_best` kept, or None where it is gone or damaged."""
        try:
            tensors, about = _tensors(self._best(round_number))
        except _UNREADABLE:
            return None
        weights = tensors.get("weights")
        return weights if (about["study"], about["round"]) == (study, round_number) else None

    def mark_evaluated(self, round_number: int, best: Best | None = None) -> None:
        """Note durably that the scores of this round have been reported, and the best score with it."""
        content = {"round": round_number, "best": None if best is None else asdict(best)}
        write_whole(self._evaluated, json.dumps(content).encode())
        for path in self.folder.glob("best-*.safetensors"):
            if best is not None and path != self._best(best.round):
                path.unlink(missing_ok=True)

    def _best(self, round_number: int) -> Path:
        return self.folder / f"best-{round_number}.safetensors"

    def evaluated(self) -> tuple[int, Best | None]:
        """The last round whose scores were reported, and the best score; 0 where none was, or nobody knows."""
        try:
            content = json.loads(self._evaluated.read_bytes())
            return int(content["round"]), _best(content["best"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, None


def _read(path: Path) -> Checkpoint | None:
    try:
        tensors, about = _tensors(path)
        weights, average = tensors.pop("weights"), tensors.pop(_AVERAGE, None)
        told = about["metrics"]
        return Checkpoint(
            study=about["study"],
            round=about["round"],
            weights=weights,
            strategy={n.removeprefix(_STATE): array for n, array in tensors.items() if n.startswith(_STATE)},
            series=about["series"],
            average=average,
            answers=about["answers"],
            epoch=about["epoch"],
            metrics=Metrics(told["outcomes"], told["training"], told["received_bytes"], _best(told["best"])),
            watch=about.get("watch", {}),
            good={n.removeprefix(_GOOD): array for n, array in tensors.items() if n.startswith(_GOOD)},
        )
    except _UNREADABLE:
        return None


def _tensors(path: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """What was written to ``path``, and what was said about it; ``_UNREADABLE`` where it is not whole."""
    with safe_open(path, framework="numpy") as file:
        about = json.loads((file.metadata() or {})["medfl"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if _digest(tensors, about) != about["digest"]:
        raise ValueError("it was damaged")
    return tensors, about


def _best(content: Mapping[str, Any] | None) -> Best | None:
    return None if content is None else Best(float(content["score"]), int(content["round"]))


def _digest(tensors: Mapping[str, NDArray[np.float32]], about: Mapping[str, Any]) -> str:
    """SHA-256 over all tensors, their names, and what is said about them."""
    names = [(name, weights_digest(array.ravel())) for name, array in sorted(tensors.items())]
    said = json.dumps({key: value for key, value in about.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(f"{names!r}{said}".encode()).hexdigest()


def save_model(
    path: Path, study: Study, layout: Layout, weights: Flat, *, round_number: int, initial: bytes | None = None
) -> None:
    """Write the model as safetensors under the network's own tensor names; the study travels in the metadata.

    Layers that the study did not train are written too, so that the file is a whole model.
    """
    if study.training.train_only != "all":
        from medfl.shared.algorithms.travel import whole_model  # imports PyTorch

        layout, weights = whole_model(study, layout, weights, initial)
    tensors: dict[str, Flat] = {}
    start = 0
    for name, shape in layout.tensors:
        size = int(np.prod(shape))
        tensors[name] = weights[start : start + size].reshape(shape)
        start += size
    about = {"study": study.canonical().decode(), "round": str(round_number), "digest": study.digest}
    write_whole(path, _in_order(save(tensors, metadata=about), about), mode=0o644)


def _in_order(content: bytes, about: Mapping[str, str]) -> bytes:
    """A safetensors file whose metadata are in the order of ``about``: the library writes them in any.

    A study names the weights it begins with by their file's digest, so that equal models must be equal files.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end]) | {"__metadata__": dict(about)}
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)  # tensors begin at a multiple of 8
    return b"".join((len(written).to_bytes(8, "little"), written, memoryview(content)[end:]))
