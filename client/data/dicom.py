"""A folder of DICOM files to cases: series grouped by their identifiers, each with the label objects that name it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import highdicom as hd
import numpy as np
import pydicom
from numpy.typing import NDArray

from medfl.client.data.case import Example, Findings, Quarantine
from medfl.client.data.headers import Header, quiet, scan
from medfl.client.data.secret import SiteKey
from medfl.client.data.segments import read_segments
from medfl.client.data.settings import DicomSettings
from medfl.client.data.volumes import read_volume
from medfl.shared.data_spec import DataSpec, Modality
from medfl.shared.errors import DataError

Task = Literal["segmentation", "classification"]
Progress = Callable[[str, int, int], None]

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"

IMAGES: Mapping[Modality, frozenset[str]] = {
    Modality.CT: frozenset({"1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"}),
    Modality.MR: frozenset({"1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4"}),
}
"""SOP classes that are images of a modality: plain, enhanced, legacy converted (PS3.4 B.5). All else stays out."""


@dataclass(frozen=True, slots=True)
class SeriesCase:
    """A series of slices and the label objects that reference it."""

    patient: str
    spec: DataSpec = field(repr=False)
    slices: tuple[Path, ...] = field(repr=False)
    segmentations: tuple[Path, ...] = field(repr=False)
    aliases: Mapping[str, str] = field(repr=False)
    attributes: Mapping[str, str]

    @property
    def identity(self) -> str:
        """Digest of the content of all files, whatever they are called."""
        parts = sorted(hashlib.sha256(path.read_bytes()).digest() for path in (*self.slices, *self.segmentations))
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def read(self) -> Example:
        """Decode, check, order and orient the volume and bring the labels onto its grid."""
        try:
            with quiet():
                datasets = [pydicom.dcmread(path) for path in self.slices]
        except Exception:
            raise Quarantine("unreadable DICOM file") from None
        volume = read_volume(datasets, self.spec.modality)
        mask, _ = read_segments(self.segmentations, volume, self.spec, self.aliases)
        return oriented(volume, mask, self.spec)


def oriented(volume: hd.Volume, mask: NDArray[np.uint8], spec: DataSpec) -> Example:
    """``volume`` and the mask on its grid, turned so that the axes run as the study says."""
    turned = volume.to_patient_orientation(spec.preprocessing.orientation)
    labels = volume.with_array(mask).to_patient_orientation(spec.preprocessing.orientation)
    spacing = tuple(float(s) for s in turned.spacing)
    return Example(np.ascontiguousarray(turned.array)[None], spacing, mask=np.ascontiguousarray(labels.array))


def find_series(
    settings: DicomSettings,
    spec: DataSpec,
    task: Task,
    key: SiteKey,
    findings: Findings,
    opted_out: Callable[[str], bool],
    progress: Progress | None = None,
) -> list[SeriesCase]:
    """Series of the study's modality that have labels, in the order of their identifiers.

    Raises:
        DataError: no such folder, or no image of the study's modality in it.
    """
    if task != "segmentation":
        raise DataError("DICOM folders give labels for segmentation; for classification use data.source: table")
    if spec.modality not in IMAGES:
        raise DataError(f"data.source: dicom does not read modality {spec.modality.value!r}")
    if not settings.folder.is_dir():
        raise DataError(f"{settings.folder}: is not a folder (data.folder)")
    headers = scan(settings.folder, key, findings, opted_out, progress)
    series, labels = _group(headers, spec, findings)
    if not series:
        raise DataError(
            f"{settings.folder}: no {spec.modality.value.upper()} series among {len(headers)} DICOM files (data.folder)"
        )
    cases = []
    for uid, slices in sorted(series.items()):
        try:
            cases.append(_case(slices, labels.get(uid, []), spec, settings))
        except Quarantine as reason:
            findings.quarantined[str(reason)] += 1
    findings.series = len(series)
    findings.studies = len({slices[0].study for slices in series.values()})
    orphans = sum(len(found) for uid, found in labels.items() if uid not in series)
    if orphans:
        findings.quarantined["label without image"] += orphans
    return cases


def _group(
    headers: list[Header], spec: DataSpec, findings: Findings
) -> tuple[dict[str, list[Header]], dict[str, list[Header]]]:
    """Image headers by their series, label headers by the series that they name."""
    series: dict[str, list[Header]] = defaultdict(list)
    labels: dict[str, list[Header]] = defaultdict(list)
    for header in headers:
        if header.sop_class in IMAGES[spec.modality]:
            series[header.series].append(header)
        elif header.sop_class == SEGMENTATION:
            findings.labels += 1
            if not header.referenced_series:
                findings.quarantined["label that names no series"] += 1
            for uid in header.referenced_series:
                labels[uid].append(header)
        else:
            findings.quarantined["file of another kind"] += 1
    return series, labels


def _case(slices: list[Header], labels: list[Header], spec: DataSpec, settings: DicomSettings) -> SeriesCase:
    if len({(h.patient, h.study, h.frame_of_reference) for h in slices}) > 1:
        raise Quarantine("mixed series")
    if not labels:
        raise Quarantine("no label")
    if any(label.patient != slices[0].patient for label in labels):
        raise Quarantine("label of another patient")
    return SeriesCase(
        slices[0].patient,
        spec,
        tuple(header.path for header in slices),
        tuple(header.path for header in labels),
        settings.aliases,
        dict(slices[0].attributes),
    )
