"""Which files of a folder are looked at: one that is closed, linked or badly named is counted, and the rest is used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from dicom_lab import KEY, SLICES, ct, hospital, save, spec

from medfl.client.data.case import Findings
from medfl.client.data.headers import Header, Reader, scan
from medfl.client.data.load import find_cases, load_site_data
from medfl.client.data.settings import DicomSettings


def scanned(folder: Path, findings: Findings) -> list[Header]:
    return scan(folder, Reader(KEY).read, lambda pseudonym: False, findings)


def test_a_folder_that_lists_its_files_and_lets_nobody_at_them_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(ct(), tmp_path / "open")
    save(ct(name="P2"), tmp_path / "closed")
    is_file = Path.is_file

    def refused(path: Path) -> bool:
        if path.parent.name == "closed":  # as for an account with r and without x on the folder, which root never is
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    findings = Findings()
    assert len(scanned(tmp_path, findings)) == SLICES
    assert findings.quarantined == {"folder that cannot be read": 1}


def test_linked_folders_are_counted_and_not_followed(tmp_path: Path) -> None:
    save(ct(), tmp_path / "data" / "one")
    save(ct(name="P2"), tmp_path / "elsewhere")
    (tmp_path / "data" / "elsewhere").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "one" / "circle").symlink_to(tmp_path / "data")
    findings = Findings()
    assert len(scanned(tmp_path / "data", findings)) == SLICES
    assert findings.quarantined == {"linked folder": 2}


def test_names_that_are_not_utf_8_are_read_kept_in_the_cache_and_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for path in hospital(folder):
        os.rename(path, os.fsencode(path.parent) + b"/M\xfcller " + os.fsencode(path.name))
    settings = DicomSettings.model_validate({"source": "dicom", "folder": folder})
    for _ in range(2):
        report = load_site_data(settings, spec(), task="segmentation", key=KEY, cache_dir=tmp_path / "cache").report
        assert (report.patients, report.quarantined) == (10, {})


def test_a_mask_whose_name_is_not_utf_8_is_a_label_without_image(tmp_path: Path) -> None:
    hospital(tmp_path / "data", patients=1)
    masks = tmp_path / "masks"
    masks.mkdir()
    Path(os.fsdecode(os.fsencode(masks) + b"/M\xfcller.nii.gz")).touch()
    findings = Findings()
    settings = DicomSettings.model_validate(
        {"source": "dicom", "folder": tmp_path / "data", "labels": {"kind": "nifti", "folder": masks, "key": "patient"}}
    )
    assert find_cases(settings, spec(), "segmentation", KEY, findings, lambda patient: False) == []
    assert findings.quarantined == {"label without image": 1, "no label": 1}
