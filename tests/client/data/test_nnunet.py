"""nnU-Net datasets: what dataset.json says is done, what it leaves open is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_lab import KEY, hounsfield, lesion
from nifti_lab import VOLUMES, as_nifti, truth, write

from medfl.client.data.load import load_site_data
from medfl.client.data.settings import NnunetSettings
from medfl.client.data.splits import Split
from medfl.shared.errors import DataError


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
        ('{"channel_names": {"1": "a"}, "labels": {}, "file_ending": ".nii"}', "numbered 0, 1, 2"),
        ('{"channel_names": {"0": "a"}, "labels": {"x": 1}, "labels": {}, "file_ending": ".nii"}', "one key twice"),
        ('{"channel_names": {"0": "a"}, "labels": {"0": "x"}, "file_ending": ".nii"}', "'0' has no whole number"),
        (
            '{"channel_names": {"0": "a"}, "labels": {"x": 1, "y": 1}, "file_ending": ".nii"}',
            "two labels have number",
        ),
        ('{"channel_names": {"0": "a"}, "labels": {"lesion": 0}, "file_ending": ".nii"}', "which is the background"),
        ('{"channel_names": {"0": "a"}, "labels": {"organ": 1}, "file_ending": ".nii"}', "the study's class 'lesion'"),
    ],
)
def test_a_wrong_dataset_json_is_one_clear_line(content: str, message: str, tmp_path: Path) -> None:
    settings = nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_site_data(settings, VOLUMES, task="segmentation", key=KEY)


def test_voxels_that_nobody_has_labelled_are_no_background(tmp_path: Path) -> None:
    settings = nnunet(tmp_path, {"background": 0, "Lesion": 3, "ignore": 4})
    mask = 3 * lesion().astype("u1")
    mask[0, 0, 0] = 4
    write(tmp_path / "labelsTr" / "case_002.nii.gz", as_nifti(mask))
    report = load_site_data(settings, VOLUMES, task="segmentation", key=KEY).report
    assert report.quarantined == {"mask with parts that nobody has labelled": 1}
    assert report.unmatched == {}


def test_a_case_without_mask_or_with_other_channels_is_counted(tmp_path: Path) -> None:
    settings = nnunet(tmp_path)
    (tmp_path / "labelsTr" / "case_000.nii.gz").unlink()
    (tmp_path / "imagesTr" / "case_001_0000.nii.gz").unlink()
    write(tmp_path / "imagesTr" / "case_002_0001.nii.gz", as_nifti(hounsfield()))
    (tmp_path / "labelsTr" / "._case_003.nii.gz").write_bytes(b"left by a file manager")
    fewer = settings.model_copy(update={"split": settings.split.model_copy(update={"min_patients": 3})})
    report = load_site_data(fewer, VOLUMES, task="segmentation", key=KEY).report
    assert report.quarantined == {"no label": 1, "a channel is missing": 1, "more channels than dataset.json names": 1}


def test_channels_are_found_by_their_names(tmp_path: Path) -> None:
    settings = nnunet(tmp_path)
    for number in range(10):
        write(tmp_path / "imagesTr" / f"case_{number:03d}_0001.nii.gz", as_nifti(-hounsfield(number)))
    content = json.loads((tmp_path / "dataset.json").read_text()) | {"channel_names": {"0": "T2", "1": "T1"}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    study = VOLUMES.model_copy(update={"modality": "mr", "channels": 2, "series": ("t1", "t2")})
    image = load_site_data(settings, study, task="segmentation", key=KEY).splits[Split.TRAIN].images[0].numpy()
    known = {hounsfield(number).astype(np.float32).tobytes() for number in range(10)}
    assert image[1].tobytes() in known
    assert (0 - image[0]).tobytes() in known
    other = study.model_copy(update={"series": ("t1", "flair")})
    with pytest.raises(DataError, match="calls its channels T2, T1, the study t1, flair"):
        load_site_data(settings, other, task="segmentation", key=KEY)
    named = settings.model_copy(update={"aliases": {"T2": "flair"}})
    assert truth(
        load_site_data(named, other.model_copy(update={"series": ("flair", "t1")}), task="segmentation", key=KEY)
    )


def test_where_every_case_is_left_out_the_line_says_why(tmp_path: Path) -> None:
    settings = nnunet(tmp_path).model_copy(update={"patient": "patient(.*)"})
    with pytest.raises(DataError, match=r"left out: case whose name has no patient \(data.patient\) \(10\)"):
        load_site_data(settings, VOLUMES, task="segmentation", key=KEY)


def test_a_case_whom_no_opt_out_list_could_name_is_left_out(tmp_path: Path) -> None:
    nnunet(tmp_path)
    fields = {"source": "nnunet", "folder": tmp_path, "split": {"min_patients": 3}}
    settings = NnunetSettings.model_validate(fields)
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        new = os.fsencode(tmp_path / folder) + b"/M\xfcller" + ending.encode()
        os.rename(tmp_path / folder / f"case_001{ending}", new)
    report = load_site_data(settings, VOLUMES, task="segmentation", key=KEY).report
    assert (report.patients, report.quarantined) == (9, {"patient whose name here is not UTF-8": 1})
