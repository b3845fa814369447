"""DICOM files of a folder to cases: grouped by their identifiers, each with the label that names it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from medfl.client.data.case import Findings, Quarantine
from medfl.client.data.dicom_cases import Drawn, ImageCase, OutsideLabel, SeriesCase, Stack
from medfl.client.data.headers import Header, Progress, Reader, scan
from medfl.client.data.memo import FileMemo, content_digest
from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import DicomSettings, DicomwebSettings, DimseSettings, NiftiLabels, TableLabels
from medfl.client.data.tables import classes_of, is_whole, read_rows
from medfl.shared.data_spec import DataSpec, Modality
from medfl.shared.errors import ConfigError, DataError

Task = Literal["segmentation", "classification"]
AnyDicom = DicomSettings | DicomwebSettings | DimseSettings

SEGMENTATIONS = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})  # SEG, label map SEG
STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"

_CT = {"1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"}
_MR = {"1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4"}
_PET = {"1.2.840.10008.5.1.4.1.1.128", "1.2.840.10008.5.1.4.1.1.130", "1.2.840.10008.5.1.4.1.1.128.1"}
VOLUMES: Mapping[Modality, frozenset[str]] = {
    Modality.CT: frozenset(_CT),
    Modality.MR: frozenset(_MR),
    Modality.PET: frozenset(_PET),
}
PLANAR: Mapping[Modality, frozenset[str]] = {
    Modality.XRAY: frozenset({"1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1"}),
    Modality.MAMMOGRAPHY: frozenset({"1.2.840.10008.5.1.4.1.1.1.2"}),
    Modality.ULTRASOUND: frozenset({"1.2.840.10008.5.1.4.1.1.6.1"}),
    Modality.FUNDUS: frozenset({"1.2.840.10008.5.1.4.1.1.77.1.5.1", "1.2.840.10008.5.1.4.1.1.77.1.5.2"}),
    Modality.PHOTO: frozenset({"1.2.840.10008.5.1.4.1.1.77.1.4"}),
}
"""SOP classes that are images of a modality, "for presentation" where there is a choice (PS3.4 B.5). All else stays
out: secondary captures above all, which are screenshots."""


@dataclass(slots=True)
class _Archive:
    """Headers of a folder, sorted by what they are."""

    images: dict[str, list[Header]] = field(default_factory=lambda: defaultdict(list))  # by series
    labels: dict[str, list[Header]] = field(default_factory=lambda: defaultdict(list))  # by the series they name


def find_dicom(
    settings: AnyDicom,
    folder: Path,
    spec: DataSpec,
    task: Task,
    key: SiteKey,
    findings: Findings,
    opted_out: Callable[[str], bool],
    progress: Progress | None = None,
    memo: FileMemo | None = None,
) -> list[SeriesCase | ImageCase]:
    """Cases in ``folder`` that have the study's images and labels, in the order of their identifiers.

    Raises:
        DataError: no such folder, or no image of the study's modality in it.
        ConfigError: the labels that are configured do not fit the task.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: is not a folder (data.folder)")
    if task == "classification" and not isinstance(settings.labels, TableLabels):
        raise ConfigError("data.labels: a classification needs labels of kind: table")
    if missing := sorted(set(spec.series) - set(settings.series)):
        raise ConfigError(f"data.series: says no description for the study's channel {missing[0]!r}")
    channels = {name: settings.series[name] for name in spec.series}
    read = Reader(key, channels).read
    headers = scan(folder, partial(memo.header, read=read) if memo else read, opted_out, findings, progress)
    archive = _sort(headers, spec, findings)
    if not archive.images:
        kind = " or ".join(sorted(modality.value for modality in _modalities(spec)))
        if isinstance(settings, DicomSettings):
            raise DataError(
                f"{folder}: no {kind} image among {len(headers)} DICOM files that can be used (data.folder)"
            )
        raise DataError(
            f"no {kind} image that can be used among {len(headers)} files: all that the PACS has for data.query"
        )
    finder = _Finder(settings, spec, archive, _Labels(settings, folder, spec, task, key, archive, findings))
    if spec.modality in PLANAR:
        candidates: Iterable[list[list[Header]]] = _by_instance(archive.images.values())
    elif spec.series:
        candidates = _by_study(archive.images.values())
    else:
        candidates = ([series] for series in archive.images.values())
    ordered = sorted(candidates, key=lambda group: group[0][0].sop_instance)
    cases = []
    for group in ordered:
        try:
            cases.append(finder.case(group))
        except Quarantine as reason:
            findings.quarantined[str(reason)] += 1
    return cases


def _modalities(spec: DataSpec) -> frozenset[Modality]:
    """Modalities that a study may use: its own; with channels from several series also others, as in CT with PET."""
    if spec.series and spec.modality in VOLUMES:
        return frozenset(VOLUMES)
    return frozenset({spec.modality})


def _sort(headers: list[Header], spec: DataSpec, findings: Findings) -> _Archive:
    wanted = {uid for modality in _modalities(spec) for uid in (VOLUMES.get(modality) or PLANAR[modality])}
    archive = _Archive()
    seen: dict[str, Header] = {}
    for header in headers:
        is_label = header.sop_class in SEGMENTATIONS or header.sop_class == STRUCTURE_SET
        if not is_label and header.sop_class not in wanted:
            findings.quarantined["SOP class that the study does not use"] += 1
        elif header.sop_instance in seen and _same_content(header, seen[header.sop_instance]):
            findings.quarantined["copy of another file"] += 1
        elif not is_label:
            archive.images[header.series].append(header)
        else:
            findings.labels += 1
            if not header.referenced_series:
                findings.quarantined["label that names no series"] += 1
            for uid in header.referenced_series:
                archive.labels[uid].append(header)
        seen.setdefault(header.sop_instance, header)
    findings.series = len(archive.images)
    findings.studies = len({series[0].study for series in archive.images.values()})
    if orphans := sum(len(found) for uid, found in archive.labels.items() if uid not in archive.images):
        findings.quarantined["label without image"] += orphans
    return archive


def _same_content(one: Header, other: Header) -> bool:
    try:
        return content_digest(one.path) == content_digest(other.path)
    except Quarantine:
        return False


def _by_instance(series: Iterable[list[Header]]) -> list[list[list[Header]]]:
    """Single images; those that claim to be the same one stay together, and are refused."""
    instances: dict[str, list[Header]] = defaultdict(list)
    for header in (header for headers in series for header in headers):
        instances[header.sop_instance].append(header)
    return [[found] for found in instances.values()]


def _by_study(series: Iterable[list[Header]]) -> list[list[list[Header]]]:
    studies: dict[str, list[list[Header]]] = defaultdict(list)
    for headers in series:
        studies[headers[0].study].append(headers)
    return list(studies.values())


class _Labels:
    """Labels that lie outside of DICOM: classes from a table, masks from NIfTI files."""

    def __init__(
        self,
        settings: AnyDicom,
        folder: Path,
        spec: DataSpec,
        task: Task,
        key: SiteKey,
        archive: _Archive,
        findings: Findings,
    ) -> None:
        self._settings = settings.labels
        self._classes: dict[str, set[str]] = defaultdict(set)
        self._spec, self._aliases, self._key, self._folder = spec, settings.aliases, key, folder
        self._findings = findings
        issuers: dict[str, set[str]] = defaultdict(set)
        for header in (header for series in archive.images.values() for header in series if header.issuer):
            issuers[header.patient].add(header.issuer)
        self._ambiguous = {patient for patient, found in issuers.items() if len(found) > 1}
        if isinstance(self._settings, TableLabels):
            if task == "segmentation":
                raise ConfigError("data.labels: kind: table gives classes of whole images; a segmentation needs masks")
            rows, columns = read_rows(self._settings.file)
            name = self._settings.key_column or self._settings.key
            for column in (name, self._settings.label_column):
                if column not in columns:
                    raise DataError(f"{self._settings.file}: has no column {column!r} (data.labels)")
            for row in rows:
                if not is_whole(row):
                    findings.quarantined["row with more cells than columns"] += 1
                    continue
                value = (row.get(name) or "").strip()
                self._classes[self._known(value)].add((row.get(self._settings.label_column) or "").strip())
        self._masks: dict[str, set[Path]] = defaultdict(set)
        if isinstance(self._settings, NiftiLabels):
            if not self._settings.folder.is_dir():
                raise DataError(f"{self._settings.folder}: is not a folder (data.labels.folder)")
            for path in sorted(self._settings.folder.iterdir()):
                stem = path.name.removesuffix(".gz").removesuffix(".nii")
                if stem != path.name.removesuffix(".gz") and not stem.startswith("."):
                    self._masks[self._known(stem)].add(path)
        self._count_without_image(archive)

    def of(self, headers: Sequence[Header]) -> OutsideLabel | None:
        """The label of the case whose first series is ``headers``; None where labels are DICOM objects."""
        match self._settings:
            case TableLabels():
                found = set().union(*(self._classes.get(name, set()) for name in self._names(headers))) - {""}
                if not found:
                    raise Quarantine("no label")
                if len(found) > 1:
                    raise Quarantine("two different labels in the table")
                self._findings.labels += 1
                return OutsideLabel(classes=classes_of(found.pop(), self._spec, self._aliases))
            case NiftiLabels():
                paths = set().union(*(self._masks.get(name, set()) for name in self._names(headers)))
                if not paths:
                    raise Quarantine("no label")
                if len(paths) > 1:
                    raise Quarantine("several files for one channel or mask")
                self._findings.labels += 1
                return OutsideLabel(nifti=paths.pop())
            case _:
                return None

    def _count_without_image(self, archive: _Archive) -> None:
        """Count what names no image: a wrong key column shows, and not only as images without labels."""
        named = set(self._classes) | set(self._masks)
        for series in archive.images.values() if named else ():
            try:
                named -= self._names(series)
            except Quarantine:  # an identifier of several issuers: each of its images will say so
                named.discard(series[0].patient)
        if named:
            self._findings.quarantined["label without image"] += len(named)

    def _known(self, name: str) -> str:
        """How what the administrator wrote is remembered: never an identifier as it is."""
        assert isinstance(self._settings, TableLabels | NiftiLabels)  # noqa: S101 - the caller has matched it
        return name.replace("\\", "/") if self._settings.key == "file" else self._key.pseudonym(name)

    def _names(self, headers: Sequence[Header]) -> set[str]:
        """Names under which a label of these files may be remembered."""
        assert isinstance(self._settings, TableLabels | NiftiLabels)  # noqa: S101 - the caller has matched it
        match self._settings.key:
            case "patient":
                if headers[0].patient in self._ambiguous:
                    raise Quarantine("one patient identifier of several issuers")
                return {headers[0].patient}  # already a pseudonym
            case "study":
                return {self._key.pseudonym(headers[0].study)}
            case "series":
                return {self._key.pseudonym(headers[0].series)}
            case "instance":
                return {self._key.pseudonym(header.sop_instance) for header in headers}
            case "file":
                return {header.path.relative_to(self._folder).as_posix() for header in headers}


@dataclass(frozen=True, slots=True)
class _Finder:
    """Puts the series of one case and its label together."""

    settings: AnyDicom
    spec: DataSpec
    archive: _Archive
    labels: _Labels

    def case(self, group: list[list[Header]]) -> SeriesCase | ImageCase:
        """The case of some series of one study (or of one image).

        Raises:
            Quarantine: a channel or the label is missing, or things of several patients or scans are mixed.
        """
        stacks = self._channels(group) if self.spec.series else group
        first = stacks[0][0]
        if any(_owner(header) != _owner(first) for stack in stacks for header in stack):
            raise Quarantine("mixed series")
        if self.spec.modality in PLANAR and len(stacks[0]) > 1:
            raise Quarantine("same instance twice")
        if any(len({h.frame_of_reference for h in stack}) > 1 for stack in stacks):
            raise Quarantine("mixed series")
        label = self.labels.of(stacks[0])
        drawn = [Drawn()] * len(stacks) if label else self._objects(stacks)
        label, attributes = label or OutsideLabel(), dict(first.attributes)
        if self.spec.modality in PLANAR:
            return ImageCase(first.patient, self.spec, first.path, label, self.settings.aliases, attributes, drawn[0])
        found = tuple(
            Stack(_modality(stack[0]), tuple(h.path for h in stack), objects)
            for stack, objects in zip(stacks, drawn, strict=True)
        )
        return SeriesCase(first.patient, self.spec, found, label, self.settings.aliases, attributes)

    def _channels(self, group: list[list[Header]]) -> list[list[Header]]:
        """One series for each channel, in the study's order."""
        out = []
        for name in self.spec.series:
            matching = [series for series in group if series[0].channel == name]
            if not matching:
                raise Quarantine("a channel is missing")
            if len(matching) > 1:
                raise Quarantine("several series for one channel")
            out.append(matching[0])
        return out

    def _objects(self, stacks: list[list[Header]]) -> list[Drawn]:
        """Label objects of each series; one that names several counts for the first of them."""
        out, seen = [], set()
        for stack in stacks:
            objects = [x for x in self.archive.labels.get(stack[0].series, []) if x.sop_instance not in seen]
            seen |= {label.sop_instance for label in objects}
            if any(label.patient != stack[0].patient for label in objects):
                raise Quarantine("label of another patient")
            segmentations = tuple(label.path for label in objects if label.sop_class in SEGMENTATIONS)
            structure_sets = tuple(label.path for label in objects if label.sop_class == STRUCTURE_SET)
            out.append(Drawn(segmentations, structure_sets))
        if not seen:
            raise Quarantine("no label")
        return out


def _owner(header: Header) -> tuple[str, str, str]:
    return header.patient, header.issuer, header.study


def _modality(header: Header) -> Modality:
    return next(modality for modality, classes in VOLUMES.items() if header.sop_class in classes)
