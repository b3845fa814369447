"""DICOM files to headers: only an allow-list of fields is read, and the patient is a pseudonym at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medfl.client.data.case import Findings, Quarantine
from medfl.client.data.files import read_file
from medfl.client.data.guard import reading
from medfl.client.data.secret import SiteKey

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` from time to time."""

_UIDS = ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"]
_FIELDS = [
    *_UIDS, "Modality", "PatientID", "IssuerOfPatientID", "PatientSex", "PatientAge", "Manufacturer",
    "ManufacturerModelName", "KVP", "MagneticFieldStrength", "SeriesDescription", "ReferencedSeriesSequence",
    "ReferencedFrameOfReferenceSequence",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Header:
    """What is kept of one file's header. Nothing in it tells who the patient is without the site's secret."""

    path: Path = field(repr=False)
    sop_class: str
    sop_instance: str = field(repr=False)
    study: str = field(repr=False)
    series: str = field(repr=False)
    frame_of_reference: str = field(repr=False)
    modality: str
    patient: str  # pseudonym
    issuer: str = field(repr=False)  # pseudonym of who gave the patient's identifier; empty where nobody says
    channel: str  # which of the study's channels the series is; empty where none
    referenced_series: frozenset[str] = field(repr=False)  # of label objects
    attributes: tuple[tuple[str, str], ...]


HEADER_FIELDS = tuple(Header.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Reader:
    """How to read headers: whose secret, and which descriptions mean which channel."""

    key: SiteKey
    channels: Mapping[str, str] = field(default_factory=dict)  # channel -> regular expression on the description

    def read(self, path: Path) -> Header:
        """The allowed part of one file's header; pixels are not read.

        Raises:
            Quarantine: not DICOM, unreadable, or without identifiers.
        """
        with reading("unreadable DICOM file"):
            dataset, _ = read_file(path, stop_before_pixels=True, specific_tags=_FIELDS)
            meta = dataset.file_meta
            patient, issuer = (_text(dataset.get(name)) for name in ("PatientID", "IssuerOfPatientID"))
            uids = [_text(dataset.get(name) or meta.get(f"MediaStorage{name}")) for name in _UIDS]
            channel = self._channel(str(dataset.get("SeriesDescription") or ""))
            attributes = tuple(sorted(_attributes(dataset).items()))
            referenced = frozenset(_referenced_series(dataset))
            modality = str(dataset.get("Modality") or "")
        if not patient:
            raise Quarantine("no patient identifier")
        if not all(uids[:4]):
            raise Quarantine("no DICOM unique identifiers")
        sop_class, instance, study, series, frame = uids
        return Header(
            path,
            sop_class,
            instance,
            study,
            series,
            frame,
            modality,
            self.key.pseudonym(patient),
            self.key.pseudonym(issuer) if issuer else "",
            channel,
            referenced,
            attributes,
        )

    def _channel(self, description: str) -> str:
        found = [name for name, pattern in self.channels.items() if re.search(pattern, description, re.IGNORECASE)]
        return found[0] if len(found) == 1 else ""


def scan(
    folder: Path,
    read: Callable[[Path], Header],
    opted_out: Callable[[str], bool],
    findings: Findings,
    progress: Progress | None = None,
) -> list[Header]:
    """Headers of all DICOM files under ``folder``, in the order of names. DICOMDIR and linked folders are left out.

    A linked folder is counted and not followed: it may lead round in a circle, or out of what was configured.
    """
    headers = []
    paths = _files(folder, findings)
    for done, path in enumerate(paths):
        if progress:
            progress("reading headers", done, len(paths))
        try:
            header = read(path)
        except Quarantine as reason:
            findings.quarantined[str(reason)] += 1
            continue
        if opted_out(header.patient):
            findings.quarantined["opted out"] += 1
        else:
            headers.append(header)
    return headers


def _files(folder: Path, findings: Findings) -> list[Path]:
    """Regular files to any depth: opening a pipe would wait for ever."""

    def cannot(error: OSError | None = None) -> None:
        findings.quarantined["folder that cannot be read"] += 1

    found = []
    for root, folders, names in os.walk(folder, onerror=cannot):
        if linked := sum(os.path.islink(os.path.join(root, name)) for name in folders):
            findings.quarantined["linked folder"] += linked
        closed = False
        for name in names:
            if name.upper() == "DICOMDIR" or name.startswith("."):
                continue
            try:
                if (path := Path(root, name)).is_file():
                    found.append(path)
            except OSError:  # the folder lists its names and does not let one at them
                closed = True
        if closed:
            cannot()
    return sorted(found)


def _text(value: object) -> str:
    """``value`` without the padding that some writers leave around identifiers."""
    return str(value or "").strip(" \0\t\r\n")


def _attributes(dataset: Any) -> dict[str, str]:
    out = {}
    if (sex := str(dataset.get("PatientSex") or "").upper()) in {"F", "M", "O"}:
        out["sex"] = sex
    if match := re.fullmatch(r"(\d{3})Y", str(dataset.get("PatientAge") or "")):
        out["age"] = age_band(int(match[1]))
    for name, keyword in (("manufacturer", "Manufacturer"), ("model", "ManufacturerModelName")):
        if value := str(dataset.get(keyword) or "").strip():
            out[name] = value[:64]
    if (kvp := dataset.get("KVP")) is not None:
        out["kvp"] = f"{float(kvp):g}"
    if (strength := dataset.get("MagneticFieldStrength")) is not None:
        out["field_strength"] = f"{float(strength):g} T"
    return out


def age_band(years: int) -> str:
    """Ten years wide; 90 and above is one band, as HIPAA's safe harbour asks.

    >>> age_band(45), age_band(93)
    ('40-49', '90+')
    """
    return "90+" if years >= 90 else f"{years // 10 * 10}-{years // 10 * 10 + 9}"


def _referenced_series(dataset: Any) -> Iterator[str]:
    """Series that a SEG or RTSTRUCT says it belongs to (PS3.3 C.8.20.2, C.8.8.5)."""
    for item in dataset.get("ReferencedSeriesSequence") or []:
        yield _text(item.SeriesInstanceUID)
    for frame in dataset.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            for series in study.get("RTReferencedSeriesSequence") or []:
                yield _text(series.SeriesInstanceUID)
