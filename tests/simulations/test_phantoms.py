"""Phantom hospitals are real DICOM, repeatable, hard for a threshold, and clearly nobody's."""

from __future__ import annotations

from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest

from medfl.client.data.load import load_site_data
from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import DicomSettings, SplitSettings
from medfl.shared.data_spec import DataSpec
from medfl.simulations.phantoms import SCANNERS, SLICES, draw_phantom, write_hospital


def test_the_same_seed_writes_the_same_bytes_of_pixels(tmp_path: Path) -> None:
    for run in ("a", "b"):
        write_hospital(tmp_path / run, 1, 1, seed=5, slices=6)
    files = [sorted((tmp_path / run).rglob("I*")) for run in ("a", "b")]
    assert len(files[0]) == 6
    for one, two in zip(*files, strict=True):
        a, b = pydicom.dcmread(one), pydicom.dcmread(two)
        assert (a.PixelData, a.SOPInstanceUID, a.PatientID) == (b.PixelData, b.SOPInstanceUID, b.PatientID)


def test_patients_are_clearly_not_people(tmp_path: Path) -> None:
    write_hospital(tmp_path, 0, 2, seed=1, slices=4)
    for path in tmp_path.rglob("I*"):
        dataset = pydicom.dcmread(path)
        assert dataset.PatientID.startswith("PHANTOM-1-")
        assert str(dataset.PatientName).startswith("PHANTOM^")
        assert dataset.PatientIdentityRemoved == "YES"


@pytest.mark.parametrize("site", range(len(SCANNERS)))
def test_every_hospital_is_read_back_voxel_by_voxel(site: int, tmp_path: Path) -> None:
    write_hospital(tmp_path, site, 1, seed=2, slices=8)
    rng = np.random.default_rng([2, site, 0])
    truth = draw_phantom(SCANNERS[site], rng, 8)
    volume = hd.get_volume_from_series([pydicom.dcmread(path) for path in tmp_path.rglob("I*")])
    assert np.array_equal(volume.to_patient_orientation("HPL").array, truth.hounsfield)
    label = hd.seg.segread(next(tmp_path.rglob("S0001"))).get_volume(combine_segments=True).match_geometry(volume)
    assert np.array_equal(label.to_patient_orientation("HPL").array.astype(bool), truth.lesion)


def test_every_patient_has_lesions_and_every_scanner_differs() -> None:
    for scanner in SCANNERS:
        assert all(draw_phantom(scanner, np.random.default_rng(n)).lesion.sum() > 50 for n in range(3))
    assert len({(s.manufacturer, s.spacing, s.noise, s.slice_spacing, s.syntax) for s in SCANNERS}) == 8


def test_brightness_alone_finds_lesions_poorly() -> None:
    intersection, predicted, there = np.zeros(60), np.zeros(60), 0
    for site, scanner in enumerate(SCANNERS):
        phantom = draw_phantom(scanner, np.random.default_rng([9, site]))
        for k, threshold in enumerate(np.linspace(0, 300, 60)):
            bright = phantom.hounsfield > threshold
            intersection[k] += (bright & phantom.lesion).sum()
            predicted[k] += bright.sum()
        there += int(phantom.lesion.sum())
    best = float((2 * intersection / (predicted + there)).max())
    assert 0.15 < best < 0.45


def test_a_phantom_hospital_goes_through_the_sites_own_door(tmp_path: Path) -> None:
    write_hospital(tmp_path, 3, 4, seed=3, slices=SLICES)
    spec = DataSpec(
        modality="ct",
        dimensions=2,
        classes=("background", "lesion"),
        preprocessing={"normalise": "window", "window": (-100, 200), "size": (64, 64), "spacing_mm": (4, 4)},
    )
    settings = DicomSettings(source="dicom", folder=tmp_path, split=SplitSettings(min_patients=4))
    data = load_site_data(settings, spec, task="segmentation", key=SiteKey(b"k" * 32))
    assert data.report.quarantined == {}
    assert data.report.subgroups["model"] == {"FS-1": 4}
    assert sum(data.report.examples.values()) == 4 * SLICES
