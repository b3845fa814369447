"""DICOM files from disk, once it is known that reading them does not take all memory."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom.filereader import read_dataset, read_preamble
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medfl.client.data.case import Quarantine

_MOST_INFLATED = 2**30
"""Bytes that a deflated file may become. Deflate packs up to a thousand to one, and pydicom unpacks all at once."""

_MOST_STORED = 2**32
"""Bytes of a file that is read at all: pixels of one element cannot be more."""

_CHUNK = 2**20
_META_IS_BEFORE = 4096


def read_file(path: Path, **options: Any) -> tuple[pydicom.FileDataset, int]:
    """``pydicom.dcmread`` with bounded memory, and the bytes of the file: of a deflated one those of its dataset,
    inflated.

    Raises:
        Quarantine: too large, or deflated and too large when it is not.
        Exception: whatever pydicom raises on damaged files: call it inside of ``reading``.
    """
    with path.open("rb") as file:
        length = _stored_length(file)
        file.seek(0)
        return pydicom.dcmread(file, **options), length


def _stored_length(file: BinaryIO) -> int:
    length = os.fstat(file.fileno()).st_size
    if length > _MOST_STORED:
        raise Quarantine("file larger than any scan")
    if DeflatedExplicitVRLittleEndian.encode() in file.read(_META_IS_BEFORE):
        file.seek(0)
        read_preamble(file, force=False)
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            return _inflated_length(file)
    return length


def _inflated_length(file: BinaryIO) -> int:
    unpacker, length = zlib.decompressobj(-zlib.MAX_WBITS), 0
    rest = file.read(_CHUNK)
    while rest and not unpacker.eof:
        length += len(unpacker.decompress(rest, _CHUNK))
        if length > _MOST_INFLATED:
            raise Quarantine("deflated file that becomes too large")
        rest = unpacker.unconsumed_tail or file.read(_CHUNK)
    return length
