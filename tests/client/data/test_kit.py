"""Real DICOM files of every kind: each is decoded or left out with a reason, as its list says, and none crashes."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from dicom_lab import KEY, spec
from real_data import DATA, needs

from medfl.client.data.case import Findings, Quarantine
from medfl.client.data.contours import read_contours
from medfl.client.data.dicom import find_dicom
from medfl.client.data.labels import label_volume
from medfl.client.data.pixels import decode, open_dataset
from medfl.client.data.planar import read_planar
from medfl.client.data.settings import DicomSettings
from medfl.client.data.volumes import AIR_HU, read_volume, slices_of_each
from medfl.shared.data_spec import Modality

KIT = DATA / "dicom"
ROWS = list(csv.DictReader((KIT / "kit.csv").open())) if KIT.is_dir() else []
NO_PREAMBLE = {f"malformed/JLS{kind}.dcm" for kind in ("L_RGB_ILV0", "L_RGB_ILV1", "L_RGB_ILV2", "N_RGB_ILV0")}

pytestmark = [needs("dicom"), pytest.mark.data]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["file"])
def test_each_file_is_decoded_or_left_out_as_its_list_says(row: dict[str, str]) -> None:
    if row["expect"] == "decode" and row["file"] not in NO_PREAMBLE:
        assert "x".join(map(str, decode(open_dataset(KIT / row["file"])).shape)) == row["shape"]
        return
    with pytest.raises(Quarantine) as caught:
        decode(open_dataset(KIT / row["file"]))
    # Without a preamble nothing says that a file is DICOM at all: it is left out, also where forcing would read it.
    assert (str(caught.value) == "not a DICOM file") or row["file"] not in NO_PREAMBLE
    assert (str(caught.value) == "no pixels") == (row["expect"] == "no-pixels")


@pytest.mark.parametrize(
    ("other", "off"), [("MR4/MR4_J2KI", 30), ("NM1/NM1_J2KR", 0), ("NM1/NM1_JPLL", 0), ("US1/US1_J2KR", 0)]
)
def test_compressed_files_equal_their_uncompressed_truth(other: str, off: int) -> None:
    truth = {"MR4": "MR4/MR4_UNC", "NM1": "NM1/NM1_UNC", "US1": "US1/US1_RLE"}[other[:3]]
    one, two = (decode(open_dataset(KIT / "compressed" / name)).astype(int) for name in (truth, other))
    assert np.abs(one - two).max() <= off


def series(folder: str) -> list[object]:
    return [open_dataset(path) for path in sorted((KIT / folder).iterdir())]


def test_a_real_compressed_ct_is_a_regular_volume_in_hounsfield_units() -> None:
    volume = read_volume(series("series/ct_siemens_j2k"), Modality.CT)  # type: ignore[arg-type]
    assert volume.spatial_shape == (20, 512, 512)
    assert volume.spacing == pytest.approx((2.0, 0.9765625, 0.9765625), abs=1e-3)
    assert volume.array.min() >= AIR_HU
    assert 0 < np.median(volume.array[volume.array > -500]) < 120  # soft tissue and contrast


def test_real_segments_lie_on_their_real_ct() -> None:
    slices = series("series/ct_ge_3slice")
    volume = read_volume(slices, Modality.CT)  # type: ignore[arg-type]
    instances = slices_of_each(slices, volume)  # type: ignore[arg-type]
    names = ("GREEN", "ORANGE", "PURPLE", "LIGHT_BLUE", "DARK_BLUE")
    study = spec(classes=("background", *names))
    mask, unmatched = label_volume([KIT / "seg" / "partial_overlaps.dcm"], [], volume, instances, study, {})
    assert unmatched == ()
    assert set(np.unique(mask).tolist()) <= set(range(6))
    # 43,639 voxels in five segments that overlap: fewer voxels than that have a class
    assert 20_000 < int((mask > 0).sum()) < 43_639


def test_contours_that_name_other_images_are_refused_and_good_ones_land() -> None:
    slices = [open_dataset(KIT / "rt" / f"ct_{n}.dcm") for n in (1, 2)]
    volume = read_volume(slices, Modality.CT)
    instances = slices_of_each(slices, volume)
    study = spec(classes=("background", "ROI-1"))
    good, _ = read_contours(KIT / "rt" / "rt.dcm", volume, instances, study, {})
    # a square of 24 mm with a hole of 15 mm on pixels of 0.488281 mm: 1474 of them, less or more along the edges
    assert int(good[1].sum()) == pytest.approx((24**2 - 15**2 + 0.5) / 0.488281**2, rel=0.05)
    for name in ("invalid_reference_rt.dcm", "non_existent_reference_rt.dcm"):
        with pytest.raises(Quarantine):
            read_contours(KIT / "rt" / name, volume, instances, study, {})


def test_a_real_inverted_radiograph_is_shown_bright_where_it_is_dense() -> None:
    dataset = open_dataset(KIT / "photometric" / "gdcm-CR-MONO1-10-chest.dcm")
    shown = read_planar(dataset, 1)
    stored = decode(dataset)
    assert shown.shape == (1, 440, 440)
    assert np.corrcoef(shown.ravel(), stored.ravel())[0, 1] < -0.9


@pytest.mark.parametrize("modality", ["ct", "mr", "xray", "ultrasound", "fundus", "pet"])
def test_the_whole_heap_at_once_never_crashes(modality: str) -> None:
    findings = Findings()
    settings = DicomSettings(source="dicom", folder=KIT)
    study = spec(modality=modality)
    try:
        cases = find_dicom(settings, KIT, study, "segmentation", KEY, findings, lambda patient: False)
    except Exception as error:
        assert type(error).__name__ == "DataError"  # noqa: PT017 - nothing of this modality in the heap
        return
    for case in cases:
        try:
            case.read()
        except Quarantine as reason:
            findings.quarantined[str(reason)] += 1
    assert sum(findings.quarantined.values()) > 50


def test_file_names_and_folders_do_not_matter(tmp_path: Path) -> None:
    for number, path in enumerate(sorted((KIT / "series" / "ct_ge_3slice").iterdir())):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "IM").write_bytes(path.read_bytes())
    (tmp_path / "label").write_bytes((KIT / "seg" / "partial_overlaps.dcm").read_bytes())
    study = spec(classes=("background", "GREEN"))
    settings = DicomSettings(source="dicom", folder=tmp_path)
    (case,) = find_dicom(settings, tmp_path, study, "segmentation", KEY, Findings(), lambda patient: False)
    example = case.read()
    assert example.image.shape == (1, 3, 512, 512)
    assert example.mask is not None
    assert example.mask.any()
    assert len(example.unmatched) == 4
