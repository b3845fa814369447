"""Damaged files never crash, and never become a case that is wrong without saying so.

``python tests/client/data/test_fuzz.py COUNT SEED`` prints what becomes of ``COUNT`` damaged files (``make fuzz``).
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_lab import COLUMN_MM, KEY, ROW_MM, SLICES, ct, hounsfield, lesion, save, seg, spec, structure_set
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)
from real_data import DATA

from medfl.client.data.case import Example, Findings
from medfl.client.data.dicom import find_dicom
from medfl.client.data.ingest import Job
from medfl.client.data.settings import DicomSettings
from medfl.shared.errors import DataError

Slices = list[pydicom.FileDataset]
KIT = DATA / "dicom"
SYNTAXES = [
    None, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless,
]  # fmt: skip


def damage(content: bytes, rng: random.Random) -> bytes:
    """Truncated, flipped, swapped, zeroed or repeated somewhere; as often in the header as in the pixels."""
    spoilt = bytearray(content)
    end = len(spoilt) if rng.random() < 0.5 else min(len(spoilt), 4096)
    at, length = rng.randrange(end), rng.randrange(1, 64)
    match rng.randrange(6):
        case 0:
            del spoilt[at:]
        case 1:
            for _ in range(rng.randrange(1, 8)):
                spoilt[rng.randrange(end)] ^= 1 << rng.randrange(8)
        case 2:
            to = rng.randrange(end)
            spoilt[at : at + length], spoilt[to : to + length] = spoilt[to : to + length], spoilt[at : at + length]
        case 3:
            spoilt[at : at + length] = bytes(len(spoilt[at : at + length]))
        case 4:
            spoilt[at : at + 2] = spoilt[at : at + 2][::-1]
        case _:
            spoilt[at:at] = spoilt[at : at + length]
    return bytes(spoilt)


def in_syntax(slices: Slices, syntax: UID | None) -> Slices:
    for dataset in slices if syntax else []:
        if syntax.is_compressed and not syntax.is_deflated:  # type: ignore[union-attr]
            dataset.compress(syntax, generate_instance_uid=False)
        else:
            dataset.file_meta.TransferSyntaxUID = syntax
    return slices


def drawn(slices: Slices) -> pydicom.Dataset:
    """The lesion as contours along the middle between voxels."""
    polygons = []
    for at, corners in (
        (2, [(3, 4), (3, 6), (7, 6), (7, 12), (9, 12), (9, 4)]),
        (3, [(3, 4), (3, 6), (9, 6), (9, 4)]),
    ):
        x, y, z = (float(v) for v in slices[at].ImagePositionPatient)
        polygons.append(np.array([(x + (c - 0.5) * COLUMN_MM, y + (r - 0.5) * ROW_MM, z) for r, c in corners]))
    return structure_set(slices, {"Lesion": polygons})


def many_in_one(slices: Slices) -> list[pydicom.Dataset]:
    for dataset in slices:
        dataset.AcquisitionNumber, dataset.SeriesDate, dataset.SeriesTime = 1, "20200101", "120000"
    image = LegacyConvertedEnhancedCTImage(slices, generate_uid(), 2, generate_uid(), 1)
    groups = image.PerFrameFunctionalGroupsSequence
    heights = [float(group.PlanePositionSequence[0].ImagePositionPatient[2]) for group in groups]
    return [image, seg([image], {"Lesion": lesion()[np.argsort(np.argsort(heights))]})]


SCENES: list[Callable[[Slices], list[pydicom.Dataset]]] = [
    *(lambda s, syntax=syntax: [*in_syntax(s, syntax), seg(s)] for syntax in SYNTAXES),  # type: ignore[misc]
    lambda s: [*s, drawn(s)],
    many_in_one,
]


@dataclass
class Outcome:
    """What became of damaged files."""

    reasons: Counter[str]
    survivors: int = 0


def read(folder: Path, expected: str, label_is_whole: bool, outcome: Outcome) -> None:
    """Read the labelled CT case in ``folder`` as a node does; what comes out must be the truth."""
    findings = Findings()
    settings = DicomSettings(source="dicom", folder=folder)
    try:
        cases = find_dicom(settings, folder, spec(), "segmentation", KEY, findings, lambda pseudonym: False)
    except DataError as error:
        findings.quarantined[str(error).rpartition(":")[2]] += 1
        cases = []
    for case in cases:
        seen: list[Example] = []
        block = Job(_Spy(case, seen), spec(), held_out=False).run()  # type: ignore[arg-type]
        if isinstance(block, str):
            findings.quarantined[block] += 1
            continue
        assert case.patient == KEY.pseudonym(expected)
        check(seen[0], label_is_whole)
        outcome.survivors += 1
    outcome.reasons += findings.quarantined
    assert cases or findings.quarantined


@dataclass
class _Spy:
    """A case that keeps what it read."""

    case: object
    seen: list[Example]

    def read(self) -> Example:
        self.seen.append(self.case.read())  # type: ignore[attr-defined]
        return self.seen[-1]


def check(example: Example, label_is_whole: bool) -> None:
    """Geometry, order, rescale and label are the truth's.

    Pixels and outlines have no checksum: some of the damaged file's may be others (all of one slice, where they are
    compressed), and what a damaged label says of the slices that it is of.
    """
    assert example.image.shape == (1, *hounsfield().shape)
    assert example.spacing_mm == pytest.approx((2.5, 0.7, 0.9), abs=0.01)
    truth = np.maximum(hounsfield(), -1024).astype(np.float32)
    right = (example.image[0] == truth).reshape(SLICES, -1).mean(axis=1)
    assert (right > 0.5).sum() >= SLICES - 1
    assert example.mask is not None
    if label_is_whole:
        assert np.array_equal(example.mask, lesion())
    assert not example.mask[[0, 1, 4, 5]].any()


def fuzz(count: int, folder: Path, seed: int) -> Outcome:
    """Damage one file of a labelled scan ``count`` times, in turn of every kind of scan."""
    rng = random.Random(seed)
    outcome = Outcome(Counter())
    for number, scene in enumerate(SCENES):
        where, name = folder / str(number), f"P{number}"
        paths = save(scene(ct(name=name)), where)
        for _ in range(-(-count // len(SCENES))):
            path = rng.choice(paths)
            original = path.read_bytes()
            path.write_bytes(damage(original, rng))
            read(where, name, path != paths[-1], outcome)
            path.write_bytes(original)
    return outcome


def fuzz_kit(count: int, folder: Path, seed: int) -> Outcome:
    """Damage real files of every kind: each is read or left out by name, whatever the study asks for."""
    rng = random.Random(seed)
    outcome = Outcome(Counter())
    files = sorted(path for path in KIT.rglob("*") if path.is_file() and path.stat().st_size < 2**20)
    modalities = ["ct", "mr", "pet", "xray", "ultrasound", "photo"]
    for number in range(count):
        where = folder / str(number)
        where.mkdir(parents=True)
        for path in (*rng.sample(files, 3), DATA / "dicom" / "rt" / "ct_1.dcm"):
            (where / path.name).write_bytes(damage(path.read_bytes(), rng))
        findings = Findings()
        table = where.parent / "labels.csv"
        table.write_text("patient,label\nnobody,0\n")
        study = spec(modality=rng.choice(modalities))
        settings = DicomSettings(source="dicom", folder=where)
        try:
            cases = find_dicom(settings, where, study, "segmentation", KEY, findings, lambda pseudonym: False)
        except DataError:
            cases = []
        for case in cases:
            block = Job(case, study, held_out=False).run()
            findings.quarantined[block if isinstance(block, str) else "read"] += 1
        outcome.reasons += findings.quarantined
    return outcome


def test_a_few_hundred_damaged_files_never_crash_or_mislead(tmp_path: Path) -> None:
    assert fuzz(80, tmp_path, seed=1).survivors > 0


@pytest.mark.data
@pytest.mark.skipif(not KIT.is_dir(), reason="needs the real files")
def test_damaged_real_files_never_crash(tmp_path: Path) -> None:
    assert fuzz_kit(30, tmp_path, seed=1).reasons.total() > 30


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_damaged_files_never_crash_or_mislead(tmp_path: Path) -> None:
    assert fuzz(2000, tmp_path, seed=2).survivors > 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        number, start = int(sys.argv[1]), int(sys.argv[2])
        for kind in [fuzz, fuzz_kit] if KIT.is_dir() else [fuzz]:
            result = kind(number if kind is fuzz else number // 4, Path(name) / kind.__name__, start)
            print(f"{kind.__name__}: {result.survivors} read as they were; left out:")
            for reason, times in result.reasons.most_common():
                print(f"  {times:5d}  {reason}")
