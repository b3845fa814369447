"""The contact sheet shows images with outlines, to its owner only, and names nobody."""

from __future__ import annotations

import base64
import io
import re
import stat
from pathlib import Path

import numpy as np
import pytest
from dicom_lab import KEY, hospital, lesion, spec
from PIL import Image
from skimage.segmentation import find_boundaries

from medfl.client.data.contact_sheet import write_contact_sheet
from medfl.client.data.load import load_site_data
from medfl.client.data.settings import DicomSettings


def pictures(page: str) -> list[np.ndarray]:  # type: ignore[type-arg]
    found = re.findall(r"base64,([A-Za-z0-9+/=]+)", page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) for content in found]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_page_shows_each_split_with_the_labels_outline(dimensions: int, tmp_path: Path) -> None:
    hospital(tmp_path / "data")
    size = (32, 32) if dimensions == 2 else (6, 32, 32)
    study = spec(dimensions=dimensions, preprocessing={"normalise": "none", "size": size})
    settings = DicomSettings(source="dicom", folder=tmp_path / "data")
    data = load_site_data(settings, study, task="segmentation", key=KEY)
    path = tmp_path / "sheet.html"
    write_contact_sheet(data, study, path, per_split=4)
    page = path.read_text()
    shown = pictures(page)
    assert len(shown) == sum(min(4, len(part)) if dimensions == 3 else 4 for part in data.splits.values())
    # 32 pixels are shown 6 times as large; the outline is red and runs along the inside of the label
    large = lesion()[2].repeat(6, 0).repeat(6, 1)
    red = (shown[0] == (230, 60, 60)).all(axis=2)
    assert np.array_equal(red, find_boundaries(large, mode="inner")) or red.sum() > 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "P00" not in page
    assert "<script" not in page
