"""DICOM files opened and decoded, whatever their transfer syntax, or a reason why not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.utils import get_expected_length, pixel_array
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

from medfl.client.data.case import Quarantine
from medfl.client.data.decoder import decompress
from medfl.client.data.files import read_file
from medfl.client.data.guard import reading

_PIXELS = 0x7FE00010
_UNDEFINED = 0xFFFFFFFF  # length of an element that ends with a delimiter
_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"  # of encapsulated pixels
_BEHIND_PIXELS = frozenset({0xFFFAFFFA, 0xFFFCFFFC})  # digital signatures, padding
_GREY = frozenset({"MONOCHROME1", "MONOCHROME2"})


def open_dataset(path: Path) -> pydicom.FileDataset:
    """The whole file. Identifiers that only its meta group has are filled in; big endian pixels become little endian.

    Raises:
        Quarantine: not DICOM, or damaged.
    """
    with reading("unreadable DICOM file"):
        dataset, length = read_file(path)
        for keyword in ("SOPClassUID", "SOPInstanceUID"):  # PS3.10 7.1: the meta group says the same
            if not dataset.get(keyword) and f"MediaStorage{keyword}" in dataset.file_meta:
                setattr(dataset, keyword, dataset.file_meta[f"MediaStorage{keyword}"].value)
        for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):  # some are padded with spaces
            if (uid := dataset.get(keyword)) and uid != uid.strip():
                setattr(dataset, keyword, uid.strip())
        _ends_with_pixels(dataset, length)
        _fragments_are_whole(dataset)
        if dataset.file_meta.get("TransferSyntaxUID") == ExplicitVRBigEndian:
            _to_little_endian(dataset)
    return dataset


def _ends_with_pixels(dataset: pydicom.FileDataset, length: int) -> None:
    """Only a signature or padding may follow pixels (PS3.5 7.1): else bytes came in between, and all behind them moved.

    ``length`` is the file's: pydicom drops a rest that is too short for an element.

    Raises:
        Quarantine: something else does.
    """
    tags = [int(tag) for tag in dataset.keys()]  # noqa: SIM118 - iterating the dataset would parse every element
    if _PIXELS not in tags:
        return
    if not set(tags[tags.index(_PIXELS) + 1 :]) <= _BEHIND_PIXELS:
        raise Quarantine("bytes behind the pixels")
    pixels: Any = dataset.get_item(_PIXELS)  # as it was read: nothing has looked at it yet
    if tags[-1] == _PIXELS and pixels.length != _UNDEFINED and pixels.value_tell + pixels.length != length:
        raise Quarantine("bytes behind the pixels")


def _fragments_are_whole(dataset: pydicom.FileDataset) -> None:
    """Refuse compressed pixels whose items (PS3.5 A.4) do not end where the value ends: bytes came in between, or went.

    pydicom looks for the delimiter wherever it is, and drops what lies between the last item and it.
    """
    if "PixelData" not in dataset or not _is_encapsulated(dataset):
        return
    value, at = dataset.PixelData, 0
    while value[at : at + 4] == _ITEM:
        at += 8 + int.from_bytes(value[at + 4 : at + 8], "little")
    if value[at:] not in {b"", _END}:
        raise Quarantine("compressed pixels that are not whole")


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
    with _checked(dataset):
        return np.asarray(pixel_array(dataset))


def stored_frames(dataset: pydicom.Dataset) -> NDArray[np.integer[Any]]:
    """Stored values of grey frames, (frame, row, column), with the sign that the header says; read-only.

    Bits above those stored must be zero, the sign's continuation, or those of a padding value. pydicom cuts them off
    unseen, and with them goes the only sign of bytes in the wrong order.

    Raises:
        Quarantine: as :func:`decode`; colour; or bits set that the header does not describe.
    """
    if int(dataset.get("SamplesPerPixel") or 1) != 1 or dataset.get("PhotometricInterpretation") not in _GREY:
        raise Quarantine("colour volume")
    with _checked(dataset):
        allocated, bits = int(dataset.BitsAllocated), int(dataset.BitsStored)
        shape = (int(dataset.get("NumberOfFrames") or 1), int(dataset.Rows), int(dataset.Columns))
        if allocated not in {8, 16, 32} or "PixelData" not in dataset or _is_encapsulated(dataset):
            return np.asarray(pixel_array(dataset)).reshape(shape)
        signed = int(dataset.PixelRepresentation) == 1
        raw = np.frombuffer(dataset.PixelData, f"<u{allocated // 8}", math.prod(shape)).reshape(shape)
        if bits == allocated:
            return raw.view(f"<i{allocated // 8}") if signed else raw
        return _within_bits(raw, bits, signed, padding_range(dataset))


def padding_range(dataset: pydicom.Dataset) -> tuple[int, int] | None:
    """Smallest and largest stored value that pad the image (PS3.3 C.7.5.1.1.2), whatever sign they are written with."""
    value, limit = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if not isinstance(value, int):
        return None
    size = 2 ** int(dataset.BitsAllocated)
    lowest = -size // 2 if int(dataset.get("PixelRepresentation") or 0) == 1 else 0
    ends = [(end - lowest) % size + lowest for end in (value, limit if isinstance(limit, int) else value)]
    return min(ends), max(ends)


def _within_bits(
    raw: NDArray[np.unsignedinteger[Any]], bits: int, signed: bool, padding: tuple[int, int] | None
) -> NDArray[np.integer[Any]]:
    """``raw`` with its sign, where every value fits into ``bits``, or is padding."""
    if int(raw.max(initial=0)) < 2 ** (bits - 1):
        return raw.view(raw.dtype.str.replace("u", "i")) if signed else raw
    if not signed:
        values, fits = raw, raw < 2**bits
    else:
        values = raw.view(raw.dtype.str.replace("u", "i"))
        half = 2 ** (bits - 1)
        fits = (values >= -half) & (values < half)
        if not fits.all() and int(raw.max()) < 2**bits:  # the sign is the highest stored bit only
            return np.asarray((values ^ half) - half)
    if padding is not None and not fits.all():
        fits |= (values >= padding[0]) & (values <= padding[1])
    if not fits.all():
        raise Quarantine("pixel bits that the header does not describe")
    return values


@contextmanager
def _checked(dataset: pydicom.Dataset) -> Iterator[None]:
    """Reading pixels of ``dataset``, once its header is known to describe them."""
    if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise Quarantine("no pixels")
    with reading("unreadable pixels"):
        if "PixelData" in dataset:
            highest, bits, allocated = (int(dataset.get(n) or 0) for n in ("HighBit", "BitsStored", "BitsAllocated"))
            if highest + 1 != bits or bits > allocated:
                raise Quarantine("pixel bits in an unusual place")
        _length_is_right(dataset)
        yield


def _is_encapsulated(dataset: pydicom.Dataset) -> bool:
    syntax = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    return syntax is not None and bool(syntax.is_encapsulated)


def frames_are_described(dataset: pydicom.Dataset) -> None:
    """Refuse a multi-frame object whose pixels, number of frames and descriptions of frames do not agree.

    Raises:
        Quarantine: they differ.
    """
    frames = dataset.get("NumberOfFrames")
    if frames is None or len(dataset.get("PerFrameFunctionalGroupsSequence") or []) != int(frames):
        raise Quarantine("frames and their descriptions differ in number")
    _length_is_right(dataset)


def _length_is_right(dataset: pydicom.Dataset) -> None:
    """Refuse native pixels of a wrong length: pydicom only warns when there are too many."""
    if _is_encapsulated(dataset) or "PixelData" not in dataset:
        return
    expected = get_expected_length(dataset)
    have = len(dataset.PixelData)
    subsampled = dataset.PhotometricInterpretation == "YBR_FULL_422"
    if not subsampled and not expected <= have <= expected + expected % 2 + 1:
        raise Quarantine("pixel data of a wrong length")
