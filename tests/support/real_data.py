"""Where the real images lie, and the mark that skips a test where they do not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("MEDFL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def needs(folder: str) -> pytest.MarkDecorator:
    """Skip unless ``folder`` of the real images is there."""
    return pytest.mark.skipif(
        not (DATA / folder).is_dir(), reason=f"the real images of {folder!r} are not under {DATA}: set MEDFL_DATA"
    )
