"""Research folders of NIfTI files read where they are: nnU-Net v2 and BIDS."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medfl.client.data.case import Example, Findings, Quarantine
from medfl.client.data.dicom_cases import oriented
from medfl.client.data.headers import age_band
from medfl.client.data.nifti import read_mask_on, read_nifti
from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import BidsSettings, NnunetSettings
from medfl.shared.data_spec import DataSpec
from medfl.shared.errors import DataError

_MAX_JSON_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class NiftiCase:
    """One NIfTI file for each channel, all on one grid, with a mask or classes."""

    patient: str
    spec: DataSpec = field(repr=False)
    images: tuple[Path, ...] = field(repr=False)
    mask: Path | None = field(default=None, repr=False)
    label: frozenset[int] | None = None
    values: Mapping[int, int] | None = field(default=None, repr=False)  # of the mask -> class
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """What the case is read from."""
        return self.images if self.mask is None else (*self.images, self.mask)

    @property
    def fingerprint(self) -> str:
        """The classes, and what the mask's values mean."""
        return repr((self.label and sorted(self.label), self.values and sorted(self.values.items())))

    def read(self) -> Example:
        """Decode the images and the mask; orient as the study says."""
        volumes = [read_nifti(path) for path in self.images]
        grid = volumes[0]
        for other in volumes[1:]:
            if other.spatial_shape != grid.spatial_shape or not np.allclose(other.affine, grid.affine, atol=0.01):
                raise Quarantine("channels on different grids")
        mask = read_mask_on(self.mask, grid, self.spec, self.values) if self.mask is not None else None
        return oriented(grid, [volume.array for volume in volumes], mask, self.spec, self.label)


def find_nnunet(
    settings: NnunetSettings, spec: DataSpec, key: SiteKey, findings: Findings, opted_out: Callable[[str], bool]
) -> list[NiftiCase]:
    """Training cases of an nnU-Net v2 dataset. Channels are its channels, in the order of their numbers.

    Raises:
        DataError: no readable ``dataset.json``, regions instead of labels, or other channels than the study's.
    """
    channels, values, ending = _description(settings, spec, findings)
    cases = []
    for mask in sorted((settings.folder / "labelsTr").glob(f"*{ending}")):
        name = mask.name.removesuffix(ending)
        images = tuple(settings.folder / "imagesTr" / f"{name}_{number:04d}{ending}" for number in channels)
        findings.series += len(images)
        findings.studies += 1
        findings.labels += 1
        try:
            match = re.fullmatch(settings.patient, name)
            if match is None or not match[1]:
                raise Quarantine("case whose name has no patient (data.patient)")
            if opted_out(key.pseudonym(match[1])):
                raise Quarantine("opted out")
            if not all(path.is_file() for path in images):
                raise Quarantine("a channel is missing")
            cases.append(NiftiCase(key.pseudonym(match[1]), spec, images, mask, values=values))
        except Quarantine as reason:
            findings.quarantined[str(reason)] += 1
    if not cases:
        raise DataError(f"{settings.folder}: no case in labelsTr and imagesTr can be used")
    return cases


def _description(settings: NnunetSettings, spec: DataSpec, findings: Findings) -> tuple[list[int], dict[int, int], str]:
    """Numbers of the channels, class of each value of a mask, and ending of the files' names."""
    content = _json(settings.folder / "dataset.json")
    try:
        channels = sorted(int(number) for number in content["channel_names"])
        labels = {str(name): value for name, value in content["labels"].items()}
        ending = str(content["file_ending"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(
            f"{settings.folder}: dataset.json is not of nnU-Net v2: it needs channel_names, labels and file_ending"
        ) from None
    if ending not in {".nii", ".nii.gz"}:
        raise DataError(f"{settings.folder}: dataset.json: file_ending must be .nii or .nii.gz")
    if len(channels) != spec.channels:
        raise DataError(f"{settings.folder}: has {len(channels)} channels, but the study has {spec.channels}")
    values: dict[int, int] = {0: 0}
    for name, value in labels.items():
        if not isinstance(value, int):
            raise DataError(f"{settings.folder}: dataset.json: label {name!r} is a region, which is not supported")
        index = spec.class_of(settings.aliases.get(name, name))
        if index is None and value:
            findings.unmatched[name] += 1
        if value:
            values[value] = index or 0  # a class that the study does not use is background
    return channels, values, ending


def find_bids(
    settings: BidsSettings, spec: DataSpec, key: SiteKey, findings: Findings, opted_out: Callable[[str], bool]
) -> list[NiftiCase]:
    """Sessions of a BIDS dataset that have every suffix once and a mask under ``derivatives``.

    Raises:
        DataError: not a BIDS dataset, or other channels than the study's.
    """
    if not (settings.folder / "dataset_description.json").is_file():
        raise DataError(f"{settings.folder}: has no dataset_description.json: it is not a BIDS dataset (data.folder)")
    if len(settings.suffixes) != spec.channels:
        raise DataError(f"data.suffixes: names {len(settings.suffixes)} suffixes, the study has {spec.channels}")
    people = _participants(settings.folder / "participants.tsv")
    cases = []
    for session in _sessions(settings.folder):
        subject = session.relative_to(settings.folder).parts[0]
        findings.studies += 1
        try:
            if opted_out(key.pseudonym(subject)) or opted_out(key.pseudonym(subject.removeprefix("sub-"))):
                raise Quarantine("opted out")
            images = tuple(_one(session, f"*/*_{suffix}.nii*", "a channel is missing") for suffix in settings.suffixes)
            findings.series += len(images)
            mask = _mask(settings, session)
            findings.labels += 1
            attributes = people.get(subject, {})
            cases.append(NiftiCase(key.pseudonym(subject), spec, images, mask, attributes=attributes))
        except Quarantine as reason:
            findings.quarantined[str(reason)] += 1
    if not cases:
        raise DataError(f"{settings.folder}: no session has the images and a mask (data.suffixes, data.masks)")
    return cases


def _sessions(folder: Path) -> list[Path]:
    subjects = sorted(path for path in folder.glob("sub-*") if path.is_dir())
    return [part for subject in subjects for part in (sorted(subject.glob("ses-*")) or [subject])]


def _one(folder: Path, pattern: str, absent: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise Quarantine(absent)
    if len(found) > 1:
        raise Quarantine("several files for one channel or mask")
    return found[0]


def _mask(settings: BidsSettings, session: Path) -> Path:
    below = session.relative_to(settings.folder)
    roots = sorted(path for path in (settings.folder / "derivatives").glob("*") if (path / below).is_dir())
    found = [path for root in roots for path in sorted((root / below).glob(f"*/*{settings.masks}.nii*"))]
    if not found:
        raise Quarantine("no label")
    if len(found) > 1:
        raise Quarantine("several files for one channel or mask")
    return found[0]


def _participants(path: Path) -> dict[str, dict[str, str]]:
    """Sex and age band by subject, where the table has them."""
    if not path.is_file():
        return {}
    out: dict[str, dict[str, str]] = {}
    try:
        rows = list(csv.DictReader(path.read_text("utf-8-sig").splitlines(), delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    for row in rows:
        attributes = {}
        if (sex := (row.get("sex") or "").strip().upper()[:1]) in {"F", "M", "O"}:
            attributes["sex"] = sex
        if re.fullmatch(r"\d{1,3}(\.\d+)?", (row.get("age") or "").strip()):
            attributes["age"] = age_band(int(float(row["age"])))
        out[(row.get("participant_id") or "").strip()] = attributes
    return out


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise DataError(f"{path}: is too large")
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is not valid JSON") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not valid JSON for a dataset")
    return content
