"""Whoever is on the opt-out list is left out however the list is written, and what matches nobody is told."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from dicom_lab import KEY, hospital, spec

from medfl.client.data.load import load_site_data, without_opted_out
from medfl.client.data.opt_out import OptOuts, read_list
from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import DicomSettings
from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.shared.errors import DataError


def out(text: str, patient: str) -> bool:
    return OptOuts(text, KEY)(KEY.pseudonym(patient))


@pytest.mark.parametrize(
    "line",
    [
        "P05", "p05", "  P05\t", "P05 # withdrew in 2026", "P05\t# withdrew", '"P05"', "'P05'", "“P05”", "P05;", "P05,",
        '"P05"; # both', "\ufeffP05", "P04\nP05\n", "P05\r\n",
    ],
)  # fmt: skip
def test_an_identifier_counts_whatever_lists_carry_around_it(line: str, tmp_path: Path) -> None:
    listed = tmp_path / "out.txt"
    listed.write_text(line)
    assert out(read_list(listed), "P05")
    assert not out(read_list(listed), "P06")


@pytest.mark.parametrize("identifier", ["P 5 #2", "P5;", '"P5"', "A#5", "P5, P6"])
def test_an_identifier_that_looks_like_more_than_one_counts_as_it_is_written(identifier: str) -> None:
    assert out(identifier, identifier)


@pytest.mark.parametrize(("line", "patient"), [('"#5"', "#5"), ('"P #5"', "P #5")])
def test_quotes_keep_what_would_be_a_comment(line: str, patient: str) -> None:
    assert out(line, patient)


def test_comments_and_empty_lines_are_no_entries() -> None:
    listed = OptOuts('# since 2025\n\n  # P05\n;;\n""\nP06\n', KEY)
    assert (listed.entries, listed.unknown) == (1, 1)
    assert not listed(KEY.pseudonym("P05"))


def loaded(settings: DicomSettings, key: SiteKey = KEY) -> SiteData:
    return load_site_data(settings, spec(), task="segmentation", key=key)


def of(folder: Path, text: str) -> DicomSettings:
    (folder / "out.txt").write_text(text)
    return DicomSettings(source="dicom", folder=folder / "data", opt_out=folder / "out.txt")


def test_entries_that_match_nobody_are_counted_and_told_without_saying_which(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hospital(tmp_path / "data", patients=11)
    report = loaded(of(tmp_path, "P05 # out\nP77 or P78\nP79\n")).report
    assert report.quarantined == {"opted out": 7}  # files of one patient
    assert (report.opt_outs, report.unknown_opt_outs) == (3, 2)
    assert "opt-out list         2  of 3 entries match no patient here" in report.lines()
    assert "2 of 3 entries of the opt-out list match no patient here" in caplog.text
    assert "P7" not in caplog.text


def test_entries_that_come_between_rounds_and_match_nobody_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hospital(tmp_path / "data", patients=11)
    data = loaded(of(tmp_path, "P05"))
    settings = of(tmp_path, "P05\nP06\nP 77")
    assert "match no patient" not in caplog.text
    caplog.set_level(logging.WARNING)
    data = without_opted_out(data, settings, KEY)
    assert caplog.text.count("1 of 3 entries of the opt-out list match no patient here") == 1
    assert without_opted_out(data, settings, KEY) is data
    assert caplog.text.count("match no patient") == 1


def test_with_another_secret_nobody_could_be_found_and_nothing_is_given_out(tmp_path: Path) -> None:
    hospital(tmp_path / "data")
    settings = of(tmp_path, "")
    data = loaded(settings)
    with pytest.raises(DataError, match="start the node again"):
        without_opted_out(data, settings, SiteKey(b"another secret of 32 bytes or so!"))


def test_those_who_stay_keep_their_numbers_and_images(tmp_path: Path) -> None:
    hospital(tmp_path / "data")
    data = loaded(of(tmp_path, ""))
    train = data.splits[Split.TRAIN]
    name = next(f"P{n:02d}" for n in range(10) if KEY.pseudonym(f"P{n:02d}") == data.pseudonyms[int(train.patients[0])])
    left = without_opted_out(data, of(tmp_path, name), KEY).splits
    assert torch.equal(left[Split.TRAIN].images, train.images[6:])
    assert torch.equal(left[Split.TRAIN].patients, train.patients[6:])
    assert left[Split.TEST] is data.splits[Split.TEST]
