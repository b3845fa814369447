"""The one place where third-party readers meet files that may be damaged: nothing they raise or print gets out."""

from __future__ import annotations

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
    (pylibjpeg-rle 2.2 does on a damaged RLE frame).
    """
    try:
        with quiet():
            yield
    except (Quarantine, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except InvalidDicomError:
        raise Quarantine("not a DICOM file") from None
    except FileNotFoundError:
        raise Quarantine("file is missing") from None
    except BaseException as error:
        raise Quarantine(reason if isinstance(reason, str) else reason(error)) from None
