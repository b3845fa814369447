"""What readers raise becomes a reason; whether the file is to blame for it, or what holds it for a while."""

from __future__ import annotations

import errno
import gzip
import pickle
from collections.abc import Callable

import pytest
import torch
from PIL import UnidentifiedImageError
from pydicom.errors import InvalidDicomError

from medfl.client.data.case import Quarantine
from medfl.client.data.guard import reading


def raising(error: BaseException) -> Callable[[], None]:
    def read() -> None:
        raise error

    return read


def outcome(read: Callable[[], object]) -> tuple[str, bool]:
    with pytest.raises(Quarantine) as caught, reading("unreadable case"):
        read()
    return str(caught.value), caught.value.passing


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (raising(OSError(errno.EIO, "Input/output error", "P05.dcm")), "file that cannot be read"),
        (raising(OSError(errno.ESTALE, "Stale file handle", "P05.dcm")), "file that cannot be read"),
        (raising(PermissionError(errno.EACCES, "Permission denied", "P05.dcm")), "file that cannot be read"),
        (raising(FileNotFoundError(errno.ENOENT, "No such file", "P05.dcm")), "file is missing"),
        (raising(MemoryError()), "not enough memory"),
        (lambda: torch.empty(2**60, dtype=torch.uint8), "not enough memory"),
    ],
)
def test_a_fault_of_disk_or_memory_passes(read: Callable[[], object], reason: str) -> None:
    assert outcome(read) == (reason, True)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("P05"), "unreadable case"),
        (RuntimeError("P05"), "unreadable case"),
        (EOFError(), "unreadable case"),
        (UnidentifiedImageError("P05.png"), "unreadable case"),
        (gzip.BadGzipFile("P05.nii.gz"), "unreadable case"),
        (OSError(errno.EINVAL, "Invalid argument"), "unreadable case"),
        (InvalidDicomError("P05"), "not a DICOM file"),
        (Quarantine("gantry tilt"), "gantry tilt"),
    ],
)
def test_a_damaged_file_stays_damaged(error: Exception, reason: str) -> None:
    assert outcome(raising(error)) == (reason, False)


def test_a_reason_comes_whole_out_of_another_process() -> None:
    again = pickle.loads(pickle.dumps(Quarantine("why", ("name",), passing=True)))
    assert (str(again), again.unmatched, again.passing) == ("why", ("name",), True)
