"""Damaged files never crash, and never become a volume that is wrong without saying so."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_lab import KEY, ct, hounsfield, lesion, save, seg, spec
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from medfl.client.data.case import Example, Findings, Quarantine
from medfl.client.data.dicom import find_dicom
from medfl.client.data.guard import reading
from medfl.client.data.settings import DicomSettings
from medfl.shared.errors import DataError

SYNTAXES = [None, RLELossless, JPEG2000Lossless, JPEGLSLossless]


def damage(content: bytes, rng: random.Random) -> bytes:
    """Truncated, flipped, swapped, zeroed or repeated somewhere."""
    spoilt = bytearray(content)
    at, length = rng.randrange(len(spoilt)), rng.randrange(1, 64)
    match rng.randrange(5):
        case 0:
            del spoilt[at:]
        case 1:
            for _ in range(rng.randrange(1, 8)):
                spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
        case 2:
            to = rng.randrange(len(spoilt))
            spoilt[at : at + length], spoilt[to : to + length] = spoilt[to : to + length], spoilt[at : at + length]
        case 3:
            spoilt[at : at + length] = bytes(len(spoilt[at : at + length]))
        case _:
            spoilt[at:at] = spoilt[at : at + length]
    return bytes(spoilt)


def header_end(path: Path) -> int:
    """Where the pixel data element begins."""
    with path.open("rb") as file:
        pydicom.dcmread(file, stop_before_pixels=True)
        return file.tell()


def read(folder: Path) -> tuple[list[Example], Findings]:
    findings = Findings()
    settings = DicomSettings(source="dicom", folder=folder)
    try:
        cases = find_dicom(settings, folder, spec(), "segmentation", KEY, findings, lambda pseudonym: False)
    except DataError:
        return [], findings
    examples = []
    for case in cases:
        try:
            with reading("unreadable case"):  # as the job of a case does
                examples.append(case.read())
        except Quarantine as reason:
            findings.quarantined[str(reason)] += 1
    return examples, findings


def fuzz(count: int, tmp_path: Path, seed: int) -> int:
    """Damage one file of a labelled series ``count`` times; how often something was read nevertheless."""
    rng = random.Random(seed)
    survivors = 0
    for number, syntax in enumerate(SYNTAXES):
        slices = ct(name=f"P{number}")
        label = seg(slices)
        for dataset in slices if syntax else []:
            dataset.compress(syntax, generate_instance_uid=False)
        folder = tmp_path / str(number)
        paths = save([*slices, label], folder)
        for _ in range(count // len(SYNTAXES)):
            path = rng.choice(paths)
            original = path.read_bytes()
            path.write_bytes(damage(original, rng))
            examples, findings = read(folder)
            path.write_bytes(original)
            survivors += len(examples)
            assert examples or findings.quarantined
            for example in examples:
                check(example)
    return survivors


def check(example: Example) -> None:
    """Geometry and order are the truth's. Values of one slice may be damaged: uncompressed pixels have no checksum."""
    assert example.image.shape == (1, *hounsfield().shape)
    assert example.spacing_mm == pytest.approx((2.5, 0.7, 0.9), abs=0.01)
    truth = np.maximum(hounsfield(), -1024).astype(np.float32)
    same = [bool((example.image[0, k] == truth[k]).mean() > 0.5) for k in range(len(truth))]
    assert sum(same) >= len(truth) - 1
    assert example.mask is not None
    assert (example.mask != lesion()).mean() < 0.05


def test_a_few_hundred_damaged_files_never_crash_or_mislead(tmp_path: Path) -> None:
    assert fuzz(240, tmp_path, seed=1) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_damaged_files_never_crash_or_mislead(tmp_path: Path) -> None:
    assert fuzz(2000, tmp_path, seed=2) > 0
