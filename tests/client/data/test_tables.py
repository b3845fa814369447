"""Tables of pictures and volumes: what a row means, and rows that nobody can be sure of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_lab import KEY, hounsfield, lesion, spec
from nifti_lab import as_nifti, write
from PIL import Image

from medfl.client.data.case import Quarantine
from medfl.client.data.load import load_site_data
from medfl.client.data.report import DataReport
from medfl.client.data.settings import TableSettings
from medfl.client.data.splits import Split
from medfl.client.data.tables import classes_of, read_rows
from medfl.shared.data_spec import DataSpec, Modality
from medfl.shared.errors import DataError


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


XRAY = spec(modality="xray", classes=("healthy", "ill"), preprocessing={"normalise": "scale_255", "size": (8, 8)})


def table(folder: Path, *more: str, head: str = "patient,image,label", study: DataSpec = XRAY) -> DataReport:
    """What becomes of four sound rows and ``more``."""
    for number in range(5):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / f"i{number}.png")
    cut = ";" if ";" in head else "\t" if "\t" in head else ","
    rows = [head, *(cut.join((f"p{n}", f"i{n}.png", "ill" if n % 2 else "healthy")) for n in range(4)), *more]
    (folder / "t.csv").write_text("\n".join(rows))
    fields = {"source": "table", "file": folder / "t.csv", "split": {"min_patients": 3}}
    return load_site_data(TableSettings.model_validate(fields), study, task="classification", key=KEY).report


@pytest.mark.parametrize(
    ("row", "reason", "cases"),
    [
        ("p0,i0.png,healthy", "copy of another row", 4),
        ("p0,i0.png,ill", "one image with two patients or labels", 3),
        ("p9,i0.png,healthy", "one image with two patients or labels", 3),  # would train and be tested on
        ("p4,i4.png,ill, beginning", "row with more cells than columns", 4),
        ("p4,i4.png,perhaps", "label that is no class of the study", 4),
        ("p4,i4.png,-1", "label that is no class of the study", 4),
        ("p4,i4.png,2", "label that is no class of the study", 4),
        ("p4,i4.png,", "no label", 4),
        ("p4,i4.png", "no label", 4),
    ],
)
def test_a_row_that_cannot_be_sure_is_left_out(row: str, reason: str, cases: int, tmp_path: Path) -> None:
    report = table(tmp_path, row)
    assert set(report.quarantined) == {reason}
    assert sum(report.cases.values()) == cases


@pytest.mark.parametrize(
    "row", ["p4,i4.png,ILL", "p4,i4.png,1", "p4,i4.png,1.0", ' p4 , i4.png ," ill "', "p4,i4.png,ill,,"]
)
def test_a_row_is_read_as_spreadsheets_write_it(row: str, tmp_path: Path) -> None:
    report = table(tmp_path, row)
    assert report.quarantined == {}
    assert report.class_balance == {"healthy": 0.4, "ill": 0.6}


@pytest.mark.parametrize(
    "head", ["patient;image;label", "patient\timage\tlabel", "\ufeffpatient,image,label", "patient,image,label\r"]
)
def test_a_table_may_be_cut_and_begin_as_spreadsheets_like(head: str, tmp_path: Path) -> None:
    assert table(tmp_path, head=head).quarantined == {}


def test_a_quote_that_does_not_close_swallows_no_rows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('patient,image,label\np0,"i0.png,ill\np1,i1.png,ill\n')
    with pytest.raises(DataError, match="not valid CSV"):
        read_rows(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("classes", "text", "index"),
    [
        (("1", "2", "3"), "1", 0),  # names before places
        (("1", "2", "3"), "0", None),
        (("none", "2", "1"), "1", 2),
        (("HER2-", "HER2+"), "her2 +", 1),
        (("0", "1"), "-1", None),  # "uncertain" in some tables
        (("10", "1"), "1.0", 1),
        (("no", "yes"), "01", 1),
    ],
)
def test_numbers_and_signs_mean_what_they_say(classes: tuple[str, ...], text: str, index: int | None) -> None:
    study = spec(classes=classes)
    if index is None:
        with pytest.raises(Quarantine, match="no class of the study"):
            classes_of(text, study, {})
    else:
        assert classes_of(text, study, {}) == {index}


def test_aliases_compare_without_case_and_punctuation() -> None:
    assert classes_of("TUMEUR-FOIE", spec(), {"Tumeur foie": "lesion"}) == {1}


def test_pictures_of_kinds_that_often_hold_text_are_counted_for_a_person(tmp_path: Path) -> None:
    assert table(tmp_path).review == {}
    ultrasound = XRAY.model_copy(update={"modality": Modality.ULTRASOUND})
    assert table(tmp_path, study=ultrasound).review == {"burned-in text possible": 4}
