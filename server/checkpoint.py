"""The state after a round as one atomic file, and the finished model."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from medfl.shared.files import write_whole
from medfl.shared.study import Study
from medfl.shared.weights import Flat, Layout, weights_digest

log = logging.getLogger("medfl.server")

_STATE = "strategy."


@dataclass(frozen=True)
class Checkpoint:
    """Everything needed to go on after ``round``: global weights, strategy memory, Flower's run series."""

    study: str  # digest
    round: int
    weights: Flat
    strategy: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    series: int | None = None


class CheckpointFolder:
    """The two latest checkpoints of a study; the older one is used where the newer is damaged."""

    def __init__(self, folder: Path) -> None:
        self._newest, self._previous = folder / "checkpoint.safetensors", folder / "checkpoint.previous.safetensors"

    def save(self, checkpoint: Checkpoint) -> None:
        """Write durably; the last one becomes the previous one. Raises OSError when the disk refuses."""
        tensors = {"weights": checkpoint.weights} | {_STATE + name: a for name, a in checkpoint.strategy.items()}
        about = {
            "study": checkpoint.study,
            "round": checkpoint.round,
            "series": checkpoint.series,
            "digest": weights_digest(checkpoint.weights),
        }
        content = save(tensors, metadata={"medfl": json.dumps(about)})
        if self._newest.exists():
            self._newest.replace(self._previous)
        write_whole(self._newest, content)

    def load(self, study: Study) -> Checkpoint | None:
        """The latest readable checkpoint of ``study``, or None where there is none."""
        for path in (self._newest, self._previous):
            if not path.exists():
                continue
            checkpoint = _read(path)
            if checkpoint is None:
                log.warning("checkpoint %s is damaged: the one before it is tried", path.name)
            elif checkpoint.study == study.digest:
                return checkpoint
        return None


def _read(path: Path) -> Checkpoint | None:
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})["medfl"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        weights = tensors.pop("weights")
        if weights_digest(weights) != about["digest"]:
            return None
        state = {name.removeprefix(_STATE): array for name, array in tensors.items()}
        return Checkpoint(about["study"], about["round"], weights, state, about["series"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def save_model(path: Path, study: Study, layout: Layout, weights: Flat, *, round_number: int) -> None:
    """Write the model as safetensors under the network's own tensor names; the study travels in the metadata."""
    tensors: dict[str, Flat] = {}
    start = 0
    for name, shape in layout.tensors:
        size = int(np.prod(shape))
        tensors[name] = weights[start : start + size].reshape(shape)
        start += size
    about = {"study": study.canonical().decode(), "digest": study.digest, "round": str(round_number)}
    write_whole(path, save(tensors, metadata=about), mode=0o644)
