"""DICOM files opened and decoded, whatever their transfer syntax, or a reason why not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.utils import get_expected_length, pixel_array
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

from medfl.client.data.case import Quarantine
from medfl.client.data.decoder import decompress
from medfl.client.data.guard import reading


def open_dataset(path: Path) -> pydicom.FileDataset:
    """The whole file. Identifiers that only its meta group has are filled in; big endian pixels become little endian.

    Raises:
        Quarantine: not DICOM, or damaged.
    """
    with reading("unreadable DICOM file"):
        dataset = pydicom.dcmread(path)
        for keyword in ("SOPClassUID", "SOPInstanceUID"):  # PS3.10 7.1: the meta group says the same
            if not dataset.get(keyword) and f"MediaStorage{keyword}" in dataset.file_meta:
                setattr(dataset, keyword, dataset.file_meta[f"MediaStorage{keyword}"].value)
        if dataset.file_meta.get("TransferSyntaxUID") == ExplicitVRBigEndian:
            _to_little_endian(dataset)
    return dataset


def open_series(paths: Sequence[Path]) -> list[pydicom.FileDataset]:
    """All of ``paths`` as :func:`open_dataset`, with compressed pixels decoded.

    Raises:
        Quarantine: one of them is not DICOM, damaged, or in a syntax that no installed decoder reads.
    """
    datasets = [open_dataset(path) for path in paths]
    decompress(datasets, paths)
    return datasets


def _to_little_endian(dataset: pydicom.FileDataset) -> None:
    """Swap pixels of a retired syntax that highdicom refuses. Bytes of 8-bit and 1-bit pixels travel in words too."""
    if "PixelData" in dataset:
        bits = int(dataset.BitsAllocated)
        if bits >= 16 or dataset["PixelData"].VR == "OW":
            size = max(bits, 16) // 8
            dataset.PixelData = np.frombuffer(dataset.PixelData, f">u{size}").astype(f"<u{size}").tobytes()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.set_original_encoding(False, True, dataset.original_character_set)


def decode(dataset: pydicom.Dataset) -> NDArray[Any]:
    """All frames as stored, colour as RGB: (row, column), (frame, row, column) or with a last axis of samples.

    Raises:
        Quarantine: no pixels, fewer or more bytes than the header says, or a syntax no installed decoder reads.
    """
    if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise Quarantine("no pixels")
    with reading("unreadable pixels"):
        _length_is_right(dataset)
        return np.asarray(pixel_array(dataset))


def _length_is_right(dataset: pydicom.Dataset) -> None:
    """Refuse native pixels of a wrong length: pydicom only warns when there are too many."""
    syntax = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    if syntax is None or syntax.is_encapsulated or "PixelData" not in dataset:
        return
    expected = get_expected_length(dataset)
    have = len(dataset.PixelData)
    subsampled = dataset.PhotometricInterpretation == "YBR_FULL_422"
    if not subsampled and not expected <= have <= expected + expected % 2 + 1:
        raise Quarantine("pixel data of a wrong length")
