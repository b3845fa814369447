"""NIfTI files: the right voxels with the right labels, or a reason."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from dicom_lab import KEY, ct, hounsfield, lesion, save, spec
from nifti_lab import RAS, VOLUMES, as_nifti, write
from numpy.typing import NDArray

from medfl.client.data.case import Quarantine
from medfl.client.data.load import load_site_data
from medfl.client.data.names import Meaning
from medfl.client.data.nifti import read_mask_on, read_nifti
from medfl.client.data.nifti_case import NiftiCase
from medfl.client.data.settings import DicomSettings
from medfl.client.data.splits import Split
from medfl.client.data.volumes import read_volume
from medfl.shared.data_spec import Modality


def test_axes_are_turned_to_the_patients_own(tmp_path: Path) -> None:
    volume = read_nifti(write(tmp_path / "v.nii.gz", as_nifti(hounsfield())))
    upright = volume.to_patient_orientation("HPL")
    assert np.array_equal(upright.array, hounsfield())
    assert upright.spacing == pytest.approx((2.5, 0.7, 0.9))


@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR", "ASL"])
def test_however_the_file_is_stored_the_volume_is_the_same(code: str, tmp_path: Path) -> None:
    image = nib.Nifti1Image(as_nifti(hounsfield()), RAS)
    turn = nib.orientations.ornt_transform(nib.io_orientation(RAS), nib.orientations.axcodes2ornt(code))
    turned = image.as_reoriented(turn)
    volume = read_nifti(write(tmp_path / "v.nii", np.asarray(turned.dataobj), turned.affine))
    assert np.array_equal(volume.to_patient_orientation("HPL").array, hounsfield())


def no_place(header: Any) -> None:
    header.set_sform(None, 0)
    header.set_qform(None, 0)


def two_places(header: Any) -> None:
    moved = RAS.copy()
    moved[0, 3] = 20
    header.set_qform(moved, 1)


@pytest.mark.parametrize(("change", "reason"), [(no_place, "without a place"), (two_places, "two different places")])
def test_a_file_whose_place_is_unclear_is_left_out(change: Callable[[Any], None], reason: str, tmp_path: Path) -> None:
    image = nib.Nifti1Image(as_nifti(hounsfield()), RAS)
    change(image.header)
    path = tmp_path / "v.nii"
    nib.save(image, path)
    raw = nib.load(path)
    assert raw is not None
    if change is no_place:  # nibabel writes an sform of its own accord
        content = bytearray(path.read_bytes())
        content[252:256] = b"\0\0\0\0"
        path.write_bytes(content)
    with pytest.raises(Quarantine, match=reason):
        read_nifti(path)


@pytest.mark.parametrize(
    ("array", "affine", "unit", "reason"),
    [
        (np.zeros((4, 4, 4, 2), np.float32), RAS, "mm", "not one volume"),
        (np.zeros((4, 4), np.float32), RAS, "mm", "not one volume"),
        (np.zeros((4, 4, 4), np.complex64), RAS, "mm", "not one volume"),
        (np.zeros((4, 4, 4), np.float32), RAS, "micron", "millimetres"),
        (np.zeros((4, 4, 4), np.float32), RAS + np.eye(4, k=1) * 0.3, "mm", "not a regular volume"),
    ],
)
def test_files_that_are_not_one_regular_volume_are_left_out(
    array: NDArray[Any], affine: NDArray[np.float64], unit: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(Quarantine, match=reason):
        read_nifti(write(tmp_path / "v.nii.gz", array, affine, unit))


@pytest.mark.parametrize("keep", [0, 10, 348, 400])
def test_a_truncated_file_is_left_out(keep: int, tmp_path: Path) -> None:
    path = write(tmp_path / "v.nii", as_nifti(hounsfield()))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Quarantine, match=r"unreadable|contradicts itself|another length"):
        read_nifti(path)


def test_a_nifti_mask_lands_on_a_dicom_series(tmp_path: Path) -> None:
    for number in range(10):
        slices = ct(hounsfield(number), name=f"P{number}")
        save(slices, tmp_path / "data" / str(number))
        volume = read_volume(slices, Modality.CT).to_patient_orientation("HPL")
        mask = volume.with_array(lesion().astype(np.uint8)).to_nibabel()
        (tmp_path / "masks").mkdir(exist_ok=True)
        nib.save(mask, tmp_path / "masks" / f"{slices[0].SeriesInstanceUID}.nii.gz")
    labels = {"kind": "nifti", "folder": tmp_path / "masks"}
    settings = DicomSettings.model_validate({"source": "dicom", "folder": tmp_path / "data", "labels": labels})
    data = load_site_data(settings, spec(), task="segmentation", key=KEY)
    assert np.array_equal(data.splits[Split.TRAIN].labels[:6].numpy(), lesion())


def test_a_mask_on_another_grid_or_with_other_values_is_refused(tmp_path: Path) -> None:
    grid = read_nifti(write(tmp_path / "v.nii", as_nifti(hounsfield())))
    moved = RAS.copy()
    moved[0, 3] = 0.45
    with pytest.raises(Quarantine, match="not on the image's grid"):
        read_mask_on(write(tmp_path / "m.nii", as_nifti(lesion().astype("u1")), moved), grid, Meaning(spec()))
    for values, reason in ((lesion() * 7, "no class of the study"), (lesion() * 0.5, "not whole")):
        with pytest.raises(Quarantine, match=reason):
            read_mask_on(write(tmp_path / "m.nii", as_nifti(values.astype(np.float32))), grid, Meaning(spec()))


def spoilt(path: Path, at: int, value: Any, kind: str = "<f4") -> Path:
    """``path`` with another value in its header."""
    content = bytearray(path.read_bytes())
    number = np.array(value, kind).tobytes()
    content[at : at + len(number)] = number
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("at", "value", "kind", "reason"),
    [
        (42, 16, "<i2", "another length"),  # dim[1]: 32 columns, said to be 16, would be read as a scramble
        (42, -32, "<i2", "contradicts itself"),
        (72, 8, "<i2", "contradicts itself"),  # bitpix of int16
        (108, 0, "<f4", "contradicts itself"),  # vox_offset: the header would be read as voxels
        (108, 336, "<f4", "contradicts itself"),
        (108, 368, "<f4", "another length"),
        (112, np.inf, "<f4", "contradicts itself"),  # scl_slope
        (112, (2, np.nan), "<f4", "unreadable"),  # slope without intercept
        (80, (1, 1, 1), "<f4", "two different voxel sizes"),  # pixdim against sform
        (280, np.nan, "<f4", "two different voxel sizes"),  # sform
        (344, int.from_bytes(b"ni1", "little"), "<u4", "contradicts itself"),  # the header of two files
    ],
)
def test_a_header_that_contradicts_itself_or_its_file_is_refused(
    at: int, value: Any, kind: str, reason: str, tmp_path: Path
) -> None:
    path = spoilt(write(tmp_path / "v.nii", as_nifti(hounsfield())), at, value, kind)
    with pytest.raises(Quarantine, match=reason):
        read_nifti(path)


@pytest.mark.parametrize(
    ("at", "value"),
    [(112, (np.nan, np.nan)), (112, (0, 5)), (256, (5, 5, 5))],  # no scale; no scale; a turn that does not count
)
def test_what_a_header_says_without_meaning_it_changes_nothing(at: int, value: Any, tmp_path: Path) -> None:
    path = spoilt(write(tmp_path / "v.nii", as_nifti(hounsfield())), at, value)
    assert np.array_equal(read_nifti(path).to_patient_orientation("HPL").array, hounsfield())


def test_a_slope_and_an_intercept_are_applied(tmp_path: Path) -> None:
    path = spoilt(write(tmp_path / "v.nii", as_nifti(hounsfield())), 112, (0.5, -7))
    assert np.array_equal(read_nifti(path).to_patient_orientation("HPL").array, hounsfield() * 0.5 - 7)


@pytest.mark.parametrize("change", ["flip", "cut", "junk"])
def test_a_damaged_compressed_file_is_noticed_by_its_checksum(change: str, tmp_path: Path) -> None:
    content = write(tmp_path / "v.nii", as_nifti(hounsfield())).read_bytes()
    packed = bytearray(gzip.compress(content, 0))  # stored as it is, so that any flip is a valid stream
    match change:
        case "flip":
            packed[2000] ^= 0x40
        case "cut":
            del packed[-8:]
        case _:
            packed += b"junk"
    (tmp_path / "v.nii.gz").write_bytes(packed)
    with pytest.raises(Quarantine, match="unreadable NIfTI file"):
        read_nifti(tmp_path / "v.nii.gz")


def test_voxels_behind_the_last_are_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "v.nii", as_nifti(hounsfield()))
    path.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(Quarantine, match="another length"):
        read_nifti(path)


def test_the_second_version_of_the_format_is_read_too(tmp_path: Path) -> None:
    image = nib.Nifti2Image(as_nifti(hounsfield()), RAS)
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / "v.nii.gz")
    assert np.array_equal(read_nifti(tmp_path / "v.nii.gz").to_patient_orientation("HPL").array, hounsfield())


def test_a_file_smaller_than_the_longest_header_is_read(tmp_path: Path) -> None:
    volume = read_nifti(write(tmp_path / "v.nii", np.arange(8, dtype=np.uint8).reshape(2, 2, 2)))
    assert sorted(volume.array.ravel().tolist()) == list(range(8))


def test_computed_tomography_below_air_is_air_as_from_dicom(tmp_path: Path) -> None:
    values = hounsfield()
    values[0] = -3024
    path = write(tmp_path / "v.nii", as_nifti(values))
    image = NiftiCase("p", VOLUMES, (path,), label=frozenset({0})).read().image
    assert np.array_equal(image[0], np.maximum(values, -1024))
    spoilt(path, 112, (100, 0))
    with pytest.raises(Quarantine, match="CT values beyond"):
        NiftiCase("p", VOLUMES, (path,), label=frozenset({0})).read()


def test_one_slice_is_no_volume(tmp_path: Path) -> None:
    path = write(tmp_path / "v.nii", as_nifti(hounsfield()[:1]))
    with pytest.raises(Quarantine, match="one slice where a volume is expected"):
        NiftiCase("p", VOLUMES, (path,), label=frozenset({0})).read()


def test_two_masks_of_one_name_are_refused(tmp_path: Path) -> None:
    for number in range(4):
        slices = ct(hounsfield(number), name=f"P{number}")
        save(slices, tmp_path / "data" / str(number))
        mask = read_volume(slices, Modality.CT).with_array(lesion()[::-1].astype(np.uint8)).to_nibabel()
        (tmp_path / "masks").mkdir(exist_ok=True)
        nib.save(mask, tmp_path / "masks" / f"P{number}.nii.gz")
    nib.save(mask, tmp_path / "masks" / "p0.nii")  # identifiers compare without case
    nib.save(mask, tmp_path / "masks" / "P9.nii.gz")  # nobody's
    labels = {"kind": "nifti", "folder": tmp_path / "masks", "key": "patient"}
    fields = {"source": "dicom", "folder": tmp_path / "data", "labels": labels, "split": {"min_patients": 3}}
    report = load_site_data(DicomSettings.model_validate(fields), spec(), task="segmentation", key=KEY).report
    assert report.quarantined == {"several files for one channel or mask": 1, "label without image": 1}
    assert report.labels == 3
