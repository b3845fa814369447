"""NIfTI files, nnU-Net and BIDS folders: the right voxels with the right labels, or a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from dicom_lab import KEY, ct, hounsfield, lesion, save, spec
from numpy.typing import NDArray

from medfl.client.data.case import Quarantine
from medfl.client.data.load import load_site_data
from medfl.client.data.nifti import read_mask_on, read_nifti
from medfl.client.data.settings import BidsSettings, DicomSettings, NnunetSettings, TableSettings
from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.client.data.volumes import read_volume
from medfl.shared.data_spec import Modality
from medfl.shared.errors import DataError

RAS = np.diag([0.9, 0.7, 2.5, 1.0])  # x right, y forwards, z up: spacing of columns, rows, slices


def write(path: Path, array: NDArray[Any], affine: NDArray[np.float64] = RAS, unit: str = "mm") -> Path:
    """``array`` runs (x, y, z)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


def as_nifti(stack: NDArray[Any]) -> NDArray[Any]:
    """(slice up, row backwards, column to the left) to (x to the right, y forwards, z up)."""
    return np.ascontiguousarray(np.transpose(stack, (2, 1, 0))[::-1, ::-1])


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
    with pytest.raises(Quarantine, match="unreadable"):
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
        read_mask_on(write(tmp_path / "m.nii", as_nifti(lesion().astype("u1")), moved), grid, spec())
    for values, reason in ((lesion() * 7, "no class of the study"), (lesion() * 0.5, "not whole")):
        with pytest.raises(Quarantine, match=reason):
            read_mask_on(write(tmp_path / "m.nii", as_nifti(values.astype(np.float32))), grid, spec())


VOLUMES = spec(dimensions=3, preprocessing={"normalise": "none", "size": (6, 32, 32)})


def truth(data: SiteData, part: Split = Split.TRAIN) -> bool:
    """Whether every image has the lesion, its values are a known volume, and both are upright."""
    known = {hounsfield(n).astype(np.float32).tobytes() for n in range(20)}
    found = data.splits[part]
    return all(image[0].numpy().tobytes() in known for image in found.images) and all(
        np.array_equal(mask.numpy(), lesion()) for mask in found.labels
    )


def nnunet(folder: Path, labels: dict[str, Any] | None = None) -> NnunetSettings:
    for number in range(10):
        write(folder / "imagesTr" / f"case_{number:03d}_0000.nii.gz", as_nifti(hounsfield(number)))
        write(folder / "labelsTr" / f"case_{number:03d}.nii.gz", as_nifti(3 * lesion().astype("u1")))
    content = {"channel_names": {"0": "CT"}, "labels": labels or {"background": 0, "organ": 1, "Lesion": 3}}
    (folder / "dataset.json").write_text(json.dumps(content | {"numTraining": 10, "file_ending": ".nii.gz"}))
    return NnunetSettings(source="nnunet", folder=folder)


def test_an_nnunet_dataset_is_read_where_it_is(tmp_path: Path) -> None:
    data = load_site_data(nnunet(tmp_path), VOLUMES, task="segmentation", key=KEY)
    assert sum(data.report.cases.values()) == 10
    assert truth(data)
    assert data.report.unmatched == {"organ": 1}


def test_a_pattern_says_which_cases_are_one_patients(tmp_path: Path) -> None:
    settings = nnunet(tmp_path).model_copy(update={"patient": r"case_\d\d(\d)"})
    assert load_site_data(settings, VOLUMES, task="segmentation", key=KEY).report.patients == 10
    pairs = settings.model_copy(update={"patient": r"case_(\d\d)\d"})
    with pytest.raises(DataError, match="only 1 patients"):
        load_site_data(pairs, VOLUMES, task="segmentation", key=KEY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not valid JSON for a dataset"),
        ("{}", "needs channel_names"),
        ('{"channel_names": {"0": "a", "1": "b"}, "labels": {}, "file_ending": ".nii"}', "has 2 channels"),
        ('{"channel_names": {"0": "a"}, "labels": {"x": [1, 2]}, "file_ending": ".nii"}', "is a region"),
        ('{"channel_names": {"0": "a"}, "labels": {}, "file_ending": ".png"}', "file_ending"),
    ],
)
def test_a_wrong_dataset_json_is_one_clear_line(content: str, message: str, tmp_path: Path) -> None:
    settings = nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_site_data(settings, VOLUMES, task="segmentation", key=KEY)


def test_a_bids_dataset_is_read_with_its_participants(tmp_path: Path) -> None:
    (tmp_path / "dataset_description.json").write_text("{}")
    people = ["participant_id\tsex\tage"]
    for number in range(10):
        below = Path(f"sub-{number:02d}") / "ses-1" / "anat"
        for suffix in ("T1w", "T2w"):
            write(tmp_path / below / f"sub-{number:02d}_ses-1_{suffix}.nii.gz", as_nifti(hounsfield(number)))
        mask = as_nifti(lesion().astype("u1"))
        write(tmp_path / "derivatives" / "manual" / below / f"sub-{number:02d}_ses-1_dseg.nii.gz", mask)
        people.append(f"sub-{number:02d}\t{'FM'[number % 2]}\t{30 + number}")
    (tmp_path / "participants.tsv").write_text("\n".join(people))
    (tmp_path / "sub-99" / "anat").mkdir(parents=True)
    settings = BidsSettings(source="bids", folder=tmp_path, suffixes=("T1w", "T2w"))
    study = VOLUMES.model_copy(update={"channels": 2})
    data = load_site_data(settings, study, task="segmentation", key=KEY)
    assert data.splits[Split.TRAIN].images.shape == (6, 2, 6, 32, 32)
    assert truth(data)
    assert data.report.subgroups == {"sex": {"F": 5, "M": 5}, "age": {"30-39": 10}}
    assert data.report.quarantined == {"a channel is missing": 1}


def test_a_table_of_nifti_files_trains_slices(tmp_path: Path) -> None:
    rows = ["patient,image,mask"]
    for number in range(10):
        write(tmp_path / f"i{number}.nii.gz", as_nifti(hounsfield(number)))
        write(tmp_path / f"m{number}.nii.gz", as_nifti(lesion().astype("u1")))
        rows.append(f"p{number},i{number}.nii.gz,m{number}.nii.gz")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    settings = TableSettings(source="table", file=tmp_path / "t.csv")
    data = load_site_data(settings, spec(), task="segmentation", key=KEY)
    assert data.report.examples == {"train": 36, "validation": 12, "test": 12}
    assert np.array_equal(data.splits[Split.TRAIN].labels[:6].numpy(), lesion())
