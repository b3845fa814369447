"""Damaged NIfTI files, pictures and tables never crash, and are never read wrongly where that can be known.

Compressed NIfTI files and PNG pictures carry checksums: what is read of a damaged one is the original. Of the others a
flipped bit may be another valid value; they must be read or left out.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damage import damage
from dicom_lab import KEY, hounsfield, lesion, spec
from nifti_lab import VOLUMES, as_nifti, write
from PIL import Image

from medfl.client.data.case import Case, Example, Findings, Quarantine
from medfl.client.data.load import find_cases
from medfl.client.data.nifti_case import NiftiCase
from medfl.client.data.settings import BidsSettings, NnunetSettings, TableSettings
from medfl.client.data.tables import PictureCase
from medfl.shared.errors import DataError

COUNT = 200
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20), np.uint8)
MASK = np.zeros((24, 20), np.uint8)
MASK[3:9, 4:12] = 1


def volumes(folder: Path, ending: str) -> NiftiCase:
    image = write(folder / f"i{ending}", as_nifti(hounsfield()))
    return NiftiCase("p", VOLUMES, (image,), write(folder / f"m{ending}", as_nifti(lesion().astype("u1"))))


def pictures(folder: Path, ending: str) -> PictureCase:
    study = spec(modality="xray", preprocessing={"normalise": "scale_255", "size": (24, 20)})
    for name, values in (("i", PIXELS), ("m", MASK)):
        Image.fromarray(values).save(folder / f"{name}{ending}")
    return PictureCase("p", study, folder / f"i{ending}", folder / f"m{ending}")


def same(one: Example, other: Example) -> bool:
    assert one.mask is not None
    assert other.mask is not None
    alike = np.array_equal(one.image, other.image) and np.array_equal(one.mask, other.mask)
    return alike and one.spacing_mm == other.spacing_mm


def fuzz(case: Case, count: int, seed: int, *, sure: bool) -> Counter[str]:
    """What becomes of ``case`` with one of its files damaged, ``count`` times."""
    rng, truth, out = random.Random(seed), case.read(), Counter[str]()
    for _ in range(count):
        path = rng.choice(case.files)
        whole = path.read_bytes()
        path.write_bytes(damage(whole, rng))
        try:
            found = case.read()
        except Quarantine as reason:
            out[str(reason)] += 1
        else:
            assert same(found, truth) or not sure
            out["read"] += 1
        path.write_bytes(whole)
    return out


@pytest.mark.parametrize(
    ("make", "ending", "sure"),
    [
        (volumes, ".nii.gz", True),
        (volumes, ".nii", False),
        (pictures, ".png", True),
        (pictures, ".tif", False),
        (pictures, ".bmp", False),
    ],
)
def test_damaged_images_and_masks_are_read_right_or_left_out(
    make: Callable[[Path, str], Case], ending: str, sure: bool, tmp_path: Path
) -> None:
    out = fuzz(make(tmp_path, ending), COUNT, 1, sure=sure)
    assert out.total() - out["read"] > COUNT / 10


def a_table(folder: Path) -> tuple[TableSettings, Path]:
    pictures(folder, ".png")
    path = folder / "t.csv"
    path.write_text("patient,image,mask\n" + "".join(f"p{n},i.png,m.png\n" for n in range(9)))
    return TableSettings(source="table", file=path), path


def a_dataset(folder: Path) -> tuple[NnunetSettings, Path]:
    write(folder / "imagesTr" / "a_0000.nii", as_nifti(hounsfield()))
    write(folder / "labelsTr" / "a.nii", as_nifti(lesion().astype("u1")))
    path = folder / "dataset.json"
    labels = {"background": 0, "lesion": 1, "organ": 2, "ignore": 3}
    path.write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii"}))
    return NnunetSettings(source="nnunet", folder=folder), path


def a_lookup(folder: Path) -> tuple[BidsSettings, Path]:
    (folder / "dataset_description.json").write_text("{}")
    write(folder / "sub-1" / "anat" / "sub-1_T1w.nii", as_nifti(hounsfield()))
    path = folder / "derivatives" / "m" / "dseg.tsv"
    write(path.parent / "sub-1" / "anat" / "sub-1_dseg.nii", as_nifti(lesion().astype("u1")))
    path.write_text("index\tname\n1\tlesion\n2\torgan\n")
    return BidsSettings(source="bids", folder=folder), path


@pytest.mark.parametrize("make", [a_table, a_dataset, a_lookup])
def test_damaged_descriptions_are_a_clear_line_or_counted(
    make: Callable[[Path], tuple[TableSettings, Path]], tmp_path: Path
) -> None:
    settings, path = make(tmp_path)
    rng, whole = random.Random(1), path.read_bytes()
    for _ in range(COUNT):
        path.write_bytes(damage(whole, rng))
        findings = Findings()
        try:
            study = VOLUMES if make is not a_table else spec()
            cases = find_cases(settings, study, "segmentation", KEY, findings, lambda patient: False)
        except DataError:
            continue
        assert cases or findings.quarantined
