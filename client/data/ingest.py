"""Cases to preprocessed blocks: from the cache where they are, else read, by worker processes where there are some."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from medfl.client.data.cache import EncryptedCache
from medfl.client.data.case import Case, Quarantine
from medfl.client.data.guard import reading
from medfl.client.data.memo import FileMemo
from medfl.client.data.preprocess import preprocess
from medfl.client.data.tensors import narrowest
from medfl.shared.data_spec import DataSpec
from medfl.shared.lifeline import end_with


@dataclass(frozen=True, slots=True)
class Block:
    """Examples of one case, ready to train: images as stored (see :class:`TensorSet`), masks for a segmentation."""

    images: Tensor
    masks: Tensor | None
    label: frozenset[int] | None
    spacing_mm: tuple[float, ...] | None
    intensity: tuple[float, float]  # lowest and highest raw value
    review: tuple[str, ...]
    unmatched: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Why a case gives no block (see :class:`Quarantine`)."""

    reason: str
    unmatched: tuple[str, ...] = ()
    passing: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """One case to be made into a block."""

    case: Case
    spec: DataSpec
    held_out: bool

    def run(self) -> Block | LeftOut:
        """The block, or the reason why there is none."""
        try:
            with reading("unreadable case"):  # headers are parsed as they are looked at: anything may raise
                example = self.case.read()
            with reading("case that cannot be preprocessed"):
                images, masks = preprocess(example, self.spec, held_out=self.held_out)
        except Quarantine as reason:
            return LeftOut(str(reason), reason.unmatched, reason.passing)
        return Block(
            _alone(narrowest(images)),
            None if masks is None else _alone(masks),
            example.label,
            example.spacing_mm,
            example.intensity,
            tuple(sorted(example.review)),
            example.unmatched,
        )

    def address(self, memo: FileMemo) -> str:
        """Digest of everything that the block depends on: content of the files, settings, and the software."""
        parts = [
            [memo.digest(path) for path in self.case.files],
            self.case.fingerprint,
            self.spec.model_dump(mode="json", exclude={"augmentation"}),
            self.held_out,
            _software(),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _software() -> list[str]:
    """Versions of what makes blocks; looking them up parses a file each."""
    return [version(name) for name in ("medfl", "pydicom", "highdicom", "nibabel", "monai", "torch")]


def _alone(tensor: Tensor) -> Tensor:
    """``tensor`` without the volume that it was cut out of, which it would keep in memory."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def blocks(
    jobs: Sequence[Job], workers: int = 1, cache: EncryptedCache | None = None, memo: FileMemo | None = None
) -> Iterator[Block | LeftOut]:
    """The block of each job, or why there is none, in the order of ``jobs``.

    At most one case for each worker, and as many blocks, are in memory besides what the caller keeps.

    Raises:
        BrokenProcessPool: a worker was killed; what came before is in the cache.
    """
    if workers == 1:
        yield from (_one(job, None, cache, memo).result() for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locked threads and the GPU's context
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(os.getpid(),)) as pool:
        yield from (pending.result() for pending in _window(jobs, workers, pool, cache, memo))


def _begin_worker(parent: int) -> None:
    end_with(parent)
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A block that is known, or on its way."""

    known: Block | LeftOut | None
    future: Future[Block | LeftOut] | None
    address: str | None
    cache: EncryptedCache | None

    def result(self) -> Block | LeftOut:
        if self.future is None:
            assert self.known is not None  # noqa: S101 - one of the two
            return self.known
        block = self.future.result()
        passing = isinstance(block, LeftOut) and block.passing
        if self.cache is not None and self.address is not None and not passing:
            self.cache.put(self.address, pack(block))
        return block


def _window(
    jobs: Iterable[Job], workers: int, pool: Executor, cache: EncryptedCache | None, memo: FileMemo | None
) -> Iterator[_Pending]:
    waiting: deque[_Pending] = deque()
    for job in jobs:
        waiting.append(_one(job, pool, cache, memo))
        if len(waiting) > workers:
            yield waiting.popleft()
    yield from waiting


def _one(job: Job, pool: Executor | None, cache: EncryptedCache | None, memo: FileMemo | None) -> _Pending:
    address = None
    if cache is not None and memo is not None:
        try:
            address = job.address(memo)
        except Quarantine as reason:
            return _Pending(LeftOut(str(reason), passing=reason.passing), None, None, None)
        content = cache.get(address)
        block = unpack(content) if content is not None else None
        if block is not None:
            return _Pending(block, None, None, None)
    future: Future[Block | LeftOut]
    if pool is not None:
        future = pool.submit(job.run)
    else:
        future = Future()
        future.set_result(job.run())
    return _Pending(None, future, address, cache)


def pack(block: Block | LeftOut) -> bytes:
    """A block, or a reason, as bytes (safetensors with its facts as metadata)."""
    if isinstance(block, LeftOut):
        return save_tensors({}, {"facts": json.dumps({"left out": block.reason, "unmatched": block.unmatched})})
    facts = {
        "label": None if block.label is None else sorted(block.label),
        "spacing_mm": block.spacing_mm,
        "intensity": block.intensity,
        "review": block.review,
        "unmatched": block.unmatched,
    }
    tensors = {"images": block.images.contiguous()} | (
        {} if block.masks is None else {"masks": block.masks.contiguous()}
    )
    return save_tensors(tensors, {"facts": json.dumps(facts)})


def unpack(content: bytes) -> Block | LeftOut | None:
    """The inverse of :func:`pack`; None where the content is of another kind."""
    try:
        tensors = load_tensors(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts: dict[str, Any] = json.loads(header["__metadata__"]["facts"])
        if "left out" in facts:
            return LeftOut(str(facts["left out"]), tuple(facts["unmatched"]))
        label, spacing = facts["label"], facts["spacing_mm"]
        return Block(
            tensors["images"],
            tensors.get("masks"),
            None if label is None else frozenset(label),
            None if spacing is None else tuple(spacing),
            (facts["intensity"][0], facts["intensity"][1]),
            tuple(facts["review"]),
            tuple(facts["unmatched"]),
        )
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError):
        return None
