"""Damaged files never crash, and never become a case that is wrong without saying so.

What has no checksum nobody can check: a byte of the pixels, or a digit of a contour, that became another valid one.
So the truth for a damaged file is the original with exactly those taken from the damaged one. Everything else of a case
that survives (shape, spacing, order of slices, rescale, patient, which label, on which voxels) equals it bit for bit.

``python tests/client/data/test_fuzz.py COUNT SEED`` prints what becomes of ``COUNT`` damaged files (``make fuzz``).
"""

from __future__ import annotations

import io
import random
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
import pytest
from damage import damage
from dicom_lab import COLUMN_MM, KEY, ROW_MM, SLICE_MM, ct, hounsfield, lesion, save, seg, spec, structure_set
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from numpy.typing import NDArray
from pydicom.filereader import read_dataset
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
from medfl.client.data.ingest import Job, LeftOut
from medfl.client.data.settings import DicomSettings
from medfl.shared.data_spec import DataSpec
from medfl.shared.errors import DataError

Slices = list[pydicom.FileDataset]
KIT = DATA / "dicom"
SYNTAXES = [
    None, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless,
]  # fmt: skip
STUDY = spec(classes=("background", "lesion", "vessel"))


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


def vessel() -> NDArray[np.bool_]:
    """A bar beside the lesion in slices 1 to 3."""
    mask = np.zeros(lesion().shape, bool)
    mask[1:4, 20:24, 15:17] = True
    return mask


def two_segments(slices: Slices, kind: str) -> pydicom.Dataset:
    return seg(slices, {"Lesion": lesion(), "Vessel": vessel()}, kind)


SCENES: list[Callable[[Slices], list[pydicom.Dataset]]] = [
    *(lambda s, syntax=syntax: [*in_syntax(s, syntax), seg(s)] for syntax in SYNTAXES),  # type: ignore[misc]
    lambda s: [*s, drawn(s)],
    many_in_one,
    *(lambda s, kind=kind: [*s, two_segments(s, kind)] for kind in ("BINARY", "LABELMAP")),  # type: ignore[misc]
]
"""Labelled scans whose truth is known; the label comes last."""


@dataclass(frozen=True)
class Wrong:
    """A damaged file that became another case than it is, and how."""

    how: str
    original: bytes = field(repr=False)
    spoilt: bytes = field(repr=False)


@dataclass
class Outcome:
    """What became of damaged files."""

    reasons: Counter[str] = field(default_factory=Counter)
    survivors: int = 0
    wrong: list[Wrong] = field(default_factory=list)


@dataclass
class _Spy:
    """A case that keeps what it read."""

    case: object
    seen: list[Example]

    def read(self) -> Example:
        self.seen.append(self.case.read())  # type: ignore[attr-defined]
        return self.seen[-1]


def read(folder: Path, study: DataSpec) -> tuple[list[tuple[str, Example]], Counter[str]]:
    """Cases of ``folder``, as a node reads them, with their patients; and what is left out."""
    findings = Findings()
    settings = DicomSettings(source="dicom", folder=folder)
    try:
        cases = find_dicom(settings, folder, study, "segmentation", KEY, findings, lambda pseudonym: False)
    except DataError as error:
        findings.quarantined[str(error).rpartition(":")[2].strip()] += 1
        cases = []
    out = []
    for case in cases:
        seen: list[Example] = []
        block = Job(_Spy(case, seen), study, held_out=False).run()  # type: ignore[arg-type]
        if isinstance(block, LeftOut):
            findings.quarantined[block.reason] += 1
        else:
            out.append((case.patient, seen[0]))
    assert out or findings.quarantined
    return out, findings.quarantined


def spliced(original: bytes, spoilt: bytes) -> bytes:
    """``original`` with what has no checksum taken from ``spoilt``: pixels, or the coordinates of contours."""
    with io.BytesIO(original) as file:
        file.seek(132)
        syntax = read_dataset(file, False, True, stop_when=lambda tag, *_: tag.group != 2).TransferSyntaxUID
        meta = file.tell()
    packed = syntax == DeflatedExplicitVRLittleEndian
    try:
        whole, other = (inflated(content[meta:]) if packed else content[meta:] for content in (original, spoilt))
    except zlib.error:
        return original
    with io.BytesIO(whole) as file:
        header = read_dataset(file, syntax == ImplicitVRLittleEndian, True, stop_when=lambda tag, *_: tag == 0x7FE00010)
        start = file.tell()
    if "ROIContourSequence" in header:
        return with_coordinates(original, spoilt)
    if len(whole) != len(other):  # bytes that have moved are no pixels any more
        return original
    content = whole[:start] + other[start:]
    return original[:meta] + (deflated(content) if packed else content)


def inflated(content: bytes) -> bytes:
    return zlib.decompress(content, -zlib.MAX_WBITS)


def deflated(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


def with_coordinates(original: bytes, spoilt: bytes) -> bytes:
    """The structure set ``original`` with the numbers of ``spoilt``, where it has as many."""
    whole = pydicom.dcmread(io.BytesIO(original))
    try:
        other = pydicom.dcmread(io.BytesIO(spoilt))
        for mine, theirs in zip(contours(whole), contours(other), strict=True):
            if len(mine.ContourData) == len(theirs.ContourData):
                mine.ContourData = theirs.ContourData
    except Exception:  # another number of contours, or none that can be read
        return original
    with io.BytesIO() as file:
        whole.save_as(file, enforce_file_format=True)
        return file.getvalue()


def contours(dataset: pydicom.Dataset) -> list[pydicom.Dataset]:
    return [contour for region in dataset.ROIContourSequence for contour in region.ContourSequence]


def difference(one: Example, other: Example) -> str:
    """What of ``one`` is not as in ``other``; nothing where all is."""
    assert one.mask is not None
    assert other.mask is not None
    if one.image.shape != other.image.shape or one.mask.shape != other.mask.shape:
        return "shape"
    if one.spacing_mm != pytest.approx(other.spacing_mm, abs=0.01):
        return "spacing"
    image, mask = (
        np.flatnonzero((a != b).reshape(len(other.mask), -1).any(axis=1)).tolist()
        for a, b in ((one.image[0], other.image[0]), (one.mask, other.mask))
    )
    return (f"values in slices {image} " if image else "") + (f"label in slices {mask}" if mask else "")


def try_one(
    path: Path, rng: random.Random, truth: Example, patient: str, outcome: Outcome, study: DataSpec = STUDY
) -> None:
    """Damage ``path``, read its folder, and put it right again."""
    original = path.read_bytes()
    spoilt = damage(original, rng)
    path.write_bytes(spoilt)
    found, reasons = read(path.parent, study)
    outcome.reasons += reasons
    if found:
        ((owner, example),) = found
        path.write_bytes(spliced(original, spoilt))
        expected, _ = read(path.parent, study)
        wrong = difference(example, expected[0][1] if expected else truth)
        if owner != patient:
            wrong += " patient"
        outcome.survivors += not wrong
        if wrong:
            outcome.wrong.append(Wrong(f"{path.parent.name}: {wrong}", original, spoilt))
    path.write_bytes(original)


def fuzz(count: int, folder: Path, seed: int) -> Outcome:
    """Damage one file of a labelled scan ``count`` times, in turn of every kind of scan."""
    rng = random.Random(seed)
    outcome = Outcome()
    for number, scene in enumerate(SCENES):
        where, patient = folder / str(number), KEY.pseudonym(f"P{number}")
        paths = save(scene(ct(name=f"P{number}")), where)
        ((_, truth),), _ = read(where, STUDY)
        assert np.array_equal(truth.image[0], np.maximum(hounsfield(), -1024))
        assert truth.spacing_mm == pytest.approx((SLICE_MM, ROW_MM, COLUMN_MM), abs=1e-6)
        assert truth.mask is not None
        assert np.array_equal(truth.mask == 1, lesion())
        for _ in range(-(-count // len(SCENES))):
            try_one(rng.choice(paths), rng, truth, patient, outcome)
    return outcome


def fuzz_real(count: int, folder: Path, seed: int) -> Outcome:
    """Damage one file of a real scan with real segments ``count`` times."""
    rng = random.Random(seed)
    outcome = Outcome()
    folder.mkdir(parents=True)
    for path in (*(KIT / "series" / "ct_ge_3slice").iterdir(), KIT / "seg" / "partial_overlaps.dcm"):
        (folder / path.name).write_bytes(path.read_bytes())
    study = spec(
        classes=("background", "GREEN", "ORANGE", "PURPLE"), preprocessing={"normalise": "none", "size": (64, 64)}
    )
    ((patient, truth),), _ = read(folder, study)
    paths = sorted(folder.iterdir())
    for _ in range(count):
        try_one(rng.choice(paths), rng, truth, patient, outcome, study)
    return outcome


def fuzz_kit(count: int, folder: Path, seed: int) -> Outcome:
    """Damage real files of every kind: each is read or left out by name, whatever the study asks for."""
    rng = random.Random(seed)
    outcome = Outcome()
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
            findings.quarantined[block.reason if isinstance(block, LeftOut) else "read"] += 1
        outcome.reasons += findings.quarantined
    return outcome


def test_a_hundred_damaged_files_never_crash_or_mislead(tmp_path: Path) -> None:
    outcome = fuzz(100, tmp_path, seed=1)
    assert outcome.wrong == []
    assert outcome.survivors > 20


@pytest.mark.data
@pytest.mark.skipif(not KIT.is_dir(), reason="needs the real files")
def test_damaged_real_files_never_crash_or_mislead(tmp_path: Path) -> None:
    assert fuzz_kit(30, tmp_path / "kit", seed=1).reasons.total() > 30
    assert fuzz_real(10, tmp_path / "real", seed=1).wrong == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_damaged_files_never_crash_or_mislead(tmp_path: Path) -> None:
    outcome = fuzz(2000, tmp_path, seed=2)
    assert outcome.wrong == []
    assert outcome.survivors > 500


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        number, start, wrong = int(sys.argv[1]), int(sys.argv[2]), 0
        for kind in [fuzz, fuzz_real, fuzz_kit] if KIT.is_dir() else [fuzz]:
            result = kind(number if kind is fuzz else number // 4, Path(name) / kind.__name__, start)
            print(f"{kind.__name__}: {result.survivors} read right, {len(result.wrong)} read wrong; left out:")
            for reason, times in result.reasons.most_common():
                print(f"  {times:5d}  {reason}")
            for item in result.wrong:
                print(f"  wrong: {item.how}")
            wrong += len(result.wrong)
    sys.exit(wrong > 0)
