"""BIDS datasets: files that belong together are found, those that may not are refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from dicom_lab import KEY, hounsfield, lesion
from nifti_lab import VOLUMES, as_nifti, truth, write

from medfl.client.data.load import load_site_data, without_opted_out
from medfl.client.data.report import DataReport
from medfl.client.data.settings import BidsSettings
from medfl.client.data.splits import Split
from medfl.shared.data_spec import DataSpec, Modality
from medfl.shared.errors import DataError


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


MR = VOLUMES.model_copy(update={"modality": Modality.MR})


def dataset(folder: Path, subjects: int = 4, masks: int = 1) -> BidsSettings:
    """T1w images without sessions, and masks whose lesion is ``masks``."""
    (folder / "dataset_description.json").write_text("{}")
    for number in range(subjects):
        below = Path(f"sub-{number:02d}") / "anat"
        write(folder / below / f"sub-{number:02d}_T1w.nii.gz", as_nifti(hounsfield(number)))
        mask = as_nifti(masks * lesion().astype("u1"))
        write(folder / "derivatives" / "manual" / below / f"sub-{number:02d}_dseg.nii.gz", mask)
    return BidsSettings.model_validate({"source": "bids", "folder": folder, "split": {"min_patients": 3}})


def report_of(settings: BidsSettings, study: DataSpec = MR) -> DataReport:
    return load_site_data(settings, study, task="segmentation", key=KEY).report


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "sub-01/anat/sub-01_T1w",
            "sub-01/anat/sub-02_T1w",
            "file named for another subject or session than its folder",
        ),
        (
            "derivatives/manual/sub-01/anat/sub-01_dseg",
            "derivatives/manual/sub-01/anat/sub-01_run-2_dseg",
            "mask of another run or acquisition than the image",
        ),
        ("sub-01/anat/sub-01_T1w", "sub-01/anat/sub-01_T2w", "a channel is missing"),
        ("derivatives/manual/sub-01", "derivatives/manual/sub-77", "no label"),
    ],
)
def test_what_is_named_for_something_else_is_left_out(old: str, new: str, reason: str, tmp_path: Path) -> None:
    settings = dataset(tmp_path)
    suffix = "" if old.endswith("sub-01") else ".nii.gz"
    shutil.move(tmp_path / f"{old}{suffix}", tmp_path / f"{new}{suffix}")
    assert report_of(settings).quarantined == {reason: 1}


def test_two_runs_are_refused_until_the_suffix_names_one(tmp_path: Path) -> None:
    settings = dataset(tmp_path)
    for number in range(4):
        below = tmp_path / f"sub-{number:02d}" / "anat"
        image = below / f"sub-{number:02d}_T1w.nii.gz"
        image.rename(below / f"sub-{number:02d}_run-1_T1w.nii.gz")
        write(below / f"sub-{number:02d}_run-2_T1w.nii.gz", as_nifti(hounsfield(15)))
    with pytest.raises(DataError, match=r"several files for one channel or mask \(4\)"):
        report_of(settings)
    first = settings.model_copy(update={"suffixes": ("run-1_T1w",)})
    data = load_site_data(first, MR, task="segmentation", key=KEY)
    assert truth(data, Split.TRAIN)
    assert not (data.splits[Split.TRAIN].images[0, 0] == hounsfield(15)).all()


def test_a_visit_without_session_folder_beside_sessions_is_read_too(tmp_path: Path) -> None:
    settings = dataset(tmp_path)
    name = "sub-00_ses-2"
    write(tmp_path / "sub-00" / "ses-2" / "anat" / f"{name}_T1w.nii.gz", as_nifti(hounsfield(9)))
    mask = tmp_path / "derivatives" / "manual" / "sub-00" / "ses-2" / "anat" / f"{name}_dseg.nii.gz"
    write(mask, as_nifti(lesion().astype("u1")))
    report = report_of(settings)
    assert (report.patients, sum(report.cases.values())) == (4, 5)


def test_a_table_says_what_the_values_of_masks_mean(tmp_path: Path) -> None:
    settings = dataset(tmp_path, masks=2)
    table = tmp_path / "derivatives" / "manual" / "dseg.tsv"
    table.write_text("index\tname\n1\tVentricle\n2\tLesion\n")
    data = load_site_data(settings, MR, task="segmentation", key=KEY)
    assert truth(data)
    assert data.report.unmatched == {"Ventricle": 1}
    table.write_text("index\tname\n1\tLesion\n2\tVentricle\n")  # the other way round: no lesion anywhere
    assert report_of(settings).class_balance["lesion"] == 0
    near = tmp_path / "derivatives" / "manual" / "sub-01" / "anat" / "sub-01_dseg.tsv"
    near.write_text("index\tname\n2\tLesion\n")  # the nearest counts
    assert report_of(settings).class_balance["lesion"] > 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("index\tname\nx\tLesion\n", "table of a mask's values that cannot be understood"),
        ("index,name\n1,Lesion\n", "table of a mask's values that cannot be understood"),
        ("index\tname\n1\tLesion\n1\tVessel\n", "table of a mask's values that cannot be understood"),
        ("index\tname\n1\tVessel\n", "table of a mask's values without a class of the study"),
    ],
)
def test_a_table_that_says_nothing_certain_is_refused(content: str, reason: str, tmp_path: Path) -> None:
    settings = dataset(tmp_path)
    (tmp_path / "derivatives" / "manual" / "sub-01" / "anat" / "sub-01_dseg.tsv").write_text(content)
    assert report_of(settings).quarantined == {reason: 1}


def test_heads_are_counted_for_a_person_unless_they_are_defaced(tmp_path: Path) -> None:
    settings = dataset(tmp_path)
    image = tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    image.rename(image.with_name("sub-01_rec-defaced_T1w.nii.gz"))
    assert report_of(settings).review == {"a face may be recognisable": 3}


def test_a_subject_whom_no_opt_out_list_could_name_is_left_out(tmp_path: Path) -> None:
    settings = dataset(tmp_path)
    for below in ("", "derivatives/manual/"):
        os.rename(tmp_path / below / "sub-01", os.fsencode(tmp_path / below) + b"/sub-M\xfcller")
    report = report_of(settings)
    assert (report.patients, report.quarantined) == (3, {"patient whose name here is not UTF-8": 1})


@pytest.mark.parametrize("written", ["{}", "sub-{}", "SUB-{}", '"{}";'])
def test_a_bids_subject_is_out_with_or_without_its_prefix_at_loading_and_between_rounds(
    written: str, tmp_path: Path
) -> None:
    settings = dataset(tmp_path, subjects=6).model_copy(update={"opt_out": tmp_path / "out.txt"})
    (tmp_path / "out.txt").write_text("")
    data = load_site_data(settings, MR, task="segmentation", key=KEY)
    number = int(data.splits[Split.TRAIN].patients[0])
    subject = next(f"{n:02d}" for n in range(6) if KEY.pseudonym(f"sub-{n:02d}") == data.pseudonyms[number])
    (tmp_path / "out.txt").write_text(written.format(subject))
    assert number not in without_opted_out(data, settings, KEY).splits[Split.TRAIN].patients
    again = load_site_data(settings, MR, task="segmentation", key=KEY)
    assert again.report.quarantined == {"opted out": 1}
    assert again.report.unknown_opt_outs == 0
