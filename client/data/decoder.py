"""Compressed pixels decoded in a process of their own: a decoder that crashes on a damaged file takes nothing along.

Native decoders do: gdcm 3.2 aborts the whole process on some damaged JPEG and JPEG 2000 streams.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import resource
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfl.client.data.case import Quarantine
from medfl.client.data.guard import reading
from medfl.shared.lifeline import end_with

if TYPE_CHECKING:
    import pydicom

Native = tuple[bytes, dict[str, Any]]
"""Uncompressed pixels, and the elements of the header that describe them."""

_DESCRIBES = ("PhotometricInterpretation", "PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit")
_SECONDS = 300  # for one series
_MOST_BYTES = 16 * 2**30  # of address space
_MOST_DECODED = 4 * 2**30  # bytes of one series: 8,000 slices of 512x512
_lock = threading.Lock()
_pool: ProcessPoolExecutor | None = None


def decompress(datasets: Sequence[pydicom.FileDataset], paths: Sequence[Path]) -> None:
    """Replace compressed pixels of ``datasets``, which were read from ``paths``, by uncompressed ones, colour as RGB.

    Raises:
        Quarantine: no installed decoder reads them, one crashed or did not end, or they are too many.
    """
    from pydicom.pixels.utils import get_expected_length
    from pydicom.uid import ExplicitVRLittleEndian

    compressed = [
        (dataset, path) for dataset, path in zip(datasets, paths, strict=True)
        if "PixelData" in dataset and dataset.file_meta.TransferSyntaxUID.is_encapsulated
    ]  # fmt: skip
    if not compressed:
        return
    with reading("unreadable pixels"):
        if sum(get_expected_length(dataset) for dataset, _ in compressed) > _MOST_DECODED:
            raise Quarantine("pixels that decode to more than any scan")
    for (dataset, _), (pixels, elements) in zip(compressed, _decode([path for _, path in compressed]), strict=True):
        dataset.PixelData = pixels
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


def end_decoder() -> None:
    """Let the helper process go, and wait until it has; the next compressed series starts another."""
    global _pool  # noqa: PLW0603 - one helper process at a time
    with _lock:
        if _pool is not None:
            _pool.shutdown(wait=True, cancel_futures=True)
            _pool = None


def _decode(paths: list[Path]) -> list[Native]:
    global _pool  # noqa: PLW0603 - one helper process at a time
    with _lock:
        if _pool is None:
            # Not a fork, which would copy locked threads and the GPU's context. The child imports no torch.
            context = multiprocessing.get_context("spawn")
            _pool = ProcessPoolExecutor(1, mp_context=context, initializer=_in_a_cell, initargs=(os.getpid(),))
            # Not atexit: a worker process would first wait for its children to end, and this one for it.
            multiprocessing.util.Finalize(None, end_decoder, exitpriority=100)
        pool = _pool
        try:
            return pool.submit(_in_child, paths).result(timeout=_SECONDS)
        except (BrokenProcessPool, TimeoutError) as error:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)
            _pool = None
            crashed = isinstance(error, BrokenProcessPool)
            raise Quarantine("a decoder crashed" if crashed else "decoding did not end", passing=True) from None


def _in_a_cell(parent: int) -> None:
    """Native decoders write to standard error, and believe a damaged header that asks for all memory."""
    end_with(parent)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _in_child(paths: list[Path]) -> list[Native]:
    import pydicom

    out: list[Native] = []
    for path in paths:
        with reading("unreadable pixels"):
            dataset = pydicom.dcmread(path)
            dataset.decompress(as_rgb=True, generate_instance_uid=False)
            elements = {keyword: dataset[keyword].value for keyword in _DESCRIBES if keyword in dataset}
            out.append((dataset.PixelData, elements))
    return out
