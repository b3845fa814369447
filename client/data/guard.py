"""The one place where third-party readers meet files that may be damaged: nothing they raise or print gets out."""

from __future__ import annotations

import errno
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pydicom.errors import InvalidDicomError

from medfl.client.data.case import Quarantine

# Log lines quote values from the files.
for _name in ("pydicom", "highdicom", "pynetdicom", "dicomweb_client", "openjpeg", "nibabel", "PIL"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)
    logging.getLogger(_name).propagate = False

_OF_DAMAGE = {None, errno.EINVAL}  # what readers raise themselves, and what a jump to before the file's start gives
_NO_MEMORY = "can't allocate memory"  # of torch, which has no error of its own for that


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, which quote values from the files too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def reading(reason: str | Callable[[BaseException], str]) -> Iterator[None]:
    """Turn whatever a reader raises into a quarantine for ``reason``; its own text may quote the file.

    Readers raise dozens of kinds on damaged files. Decoders written in Rust even panic, which is not an ``Exception``
    (pylibjpeg-rle 2.2 does on a damaged RLE frame). Where the disk or the memory fails it is not the file's fault: that
    has reasons of its own, which are passing.
    """
    try:
        with quiet():
            yield
    except (Quarantine, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except InvalidDicomError:
        raise Quarantine("not a DICOM file") from None
    except BaseException as error:
        if isinstance(error, OSError) and error.errno not in _OF_DAMAGE:
            raise unreachable(error) from None
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY in str(error)):
            raise Quarantine("not enough memory", passing=True) from None
        raise Quarantine(reason if isinstance(reason, str) else reason(error)) from None


def unreachable(error: OSError) -> Quarantine:
    """Why a file cannot be read that the system does not give."""
    missing = isinstance(error, FileNotFoundError)
    return Quarantine("file is missing" if missing else "file that cannot be read", passing=True)
