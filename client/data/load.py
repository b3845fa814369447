"""From a site's ``data:`` section to tensors on the training device, split by patient, with a report."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from medfl.client.data.case import Case, Example, Findings, Quarantine
from medfl.client.data.headers import Progress
from medfl.client.data.preprocess import preprocess
from medfl.client.data.report import DataReport, Range
from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import (
    BidsSettings,
    DataSettings,
    DicomSettings,
    DicomwebSettings,
    DimseSettings,
    NnunetSettings,
    TableSettings,
)
from medfl.client.data.splits import Split, split_patients
from medfl.client.data.tensors import SiteData, TensorSet, gather, narrowest
from medfl.shared.data_spec import DataSpec
from medfl.shared.errors import DataError

Task = Literal["segmentation", "classification"]


def load_site_data(
    settings: DataSettings,
    spec: DataSpec,
    *,
    task: Task,
    key: SiteKey,
    device: torch.device | str = "cpu",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> SiteData:
    """Find, read, check, preprocess and split the site's cases, and put them on ``device``.

    A case that cannot be read safely is left out and counted by reason in the report.

    Raises:
        DataError: nothing to train on: no folder, no images, no labels, or too few patients. One line, no file name
            below the configured folder and no patient.
    """
    started = time.monotonic()
    findings = Findings()
    cases = find_cases(settings, spec, task, key, findings, progress)
    if not cases:
        raise DataError(f"no case has an image and a label that can be used{_because(findings)}")
    parts = split_patients({case.patient for case in cases}, key, settings.split)
    numbers = {patient: number for number, patient in enumerate(sorted(parts))}
    blocks: dict[Split, list[tuple[Tensor, Tensor, int]]] = defaultdict(list)
    statistics = _Statistics(len(spec.classes))
    for done, case in enumerate(cases):
        if progress:
            progress("reading images", done, len(cases))
        part = parts[case.patient]
        try:
            example = case.read()
            images, masks = preprocess(example, spec, held_out=part is not Split.TRAIN)
        except Quarantine as reason:
            findings.quarantined[str(reason)] += 1
            continue
        labels = masks if masks is not None else _class_labels(example, spec, len(images))
        blocks[part].append((narrowest(images), labels, numbers[case.patient]))
        statistics.add(example, labels, case)
        findings.unmatched.update(example.unmatched)
        findings.review.update(example.review)
    if progress:
        progress("reading images", len(cases), len(cases))
    splits = {part: _tensor_set(blocks[part], spec, task, torch.device(device)) for part in Split}
    _refuse_empty(splits, settings, findings)
    report = DataReport(
        patients=len(statistics.patients),
        studies=findings.studies,
        series=findings.series,
        labels=findings.labels,
        cases={part: len(blocks[part]) for part in Split},
        examples={part: len(splits[part]) for part in Split},
        quarantined=dict(findings.quarantined),
        unmatched=dict(findings.unmatched),
        review=dict(findings.review),
        class_balance=statistics.balance(spec),
        spacing_mm=statistics.spacing,
        intensity=statistics.intensity,
        subgroups=statistics.subgroups(),
        seconds=time.monotonic() - started,
    )
    return SiteData(splits, report)


def find_cases(
    settings: DataSettings,
    spec: DataSpec,
    task: Task,
    key: SiteKey,
    findings: Findings,
    progress: Progress | None = None,
) -> Sequence[Case]:
    """Cases of whatever source ``settings`` names; what is left out is counted in ``findings``."""
    opted_out = _opt_out(settings.opt_out)
    match settings:
        case DicomSettings():
            from medfl.client.data.dicom import find_dicom

            return find_dicom(settings, settings.folder, spec, task, key, findings, opted_out, progress)
        case TableSettings():
            from medfl.client.data.tables import find_pictures

            return find_pictures(settings, spec, task, key, findings, opted_out)
        case NnunetSettings() | BidsSettings() if task != "segmentation":
            raise DataError(f"data.source: {settings.source} has masks only: list the images with source: table")
        case NnunetSettings():
            from medfl.client.data.layouts import find_nnunet

            return find_nnunet(settings, spec, key, findings, opted_out)
        case BidsSettings():
            from medfl.client.data.layouts import find_bids

            return find_bids(settings, spec, key, findings, opted_out)
        case DicomwebSettings() | DimseSettings():
            from medfl.client.data.dicom import find_dicom
            from medfl.client.data.pacs import fetch_all

            fetch_all(settings, findings, opted_out, progress)
            return find_dicom(settings, settings.fetch.folder, spec, task, key, findings, opted_out, progress)


def _opt_out(path: Path | None) -> Callable[[str], bool]:
    """Whether a patient is on the site's opt-out list; a list that cannot be read stops everything."""
    if path is None:
        return lambda patient: False
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise DataError(
            f"{path}: the opt-out list cannot be read (data.opt_out): nothing is loaded without it"
        ) from None
    refused = {line.strip().upper() for line in lines if line.strip() and not line.startswith("#")}
    return lambda patient: patient.strip().upper() in refused


def _class_labels(example: Example, spec: DataSpec, rows: int) -> Tensor:
    assert example.label is not None  # noqa: S101 - a source gives a mask or a class
    if spec.multi_label:
        row = torch.zeros(len(spec.classes))
        row[sorted(example.label)] = 1
        return row.repeat(rows, 1)
    (index,) = example.label
    return torch.full((rows,), index, dtype=torch.int64)


def _tensor_set(
    blocks: list[tuple[Tensor, Tensor, int]], spec: DataSpec, task: Task, device: torch.device
) -> TensorSet:
    if blocks:
        return gather([b[0] for b in blocks], [b[1] for b in blocks], [b[2] for b in blocks], device)
    size = spec.preprocessing.size
    match task, spec.multi_label:
        case "segmentation", _:
            empty = torch.empty((0, *size), dtype=torch.uint8, device=device)
        case _, True:
            empty = torch.empty((0, len(spec.classes)), device=device)
        case _:
            empty = torch.empty(0, dtype=torch.int64, device=device)
    images = torch.empty((0, spec.channels, *size), device=device)
    return TensorSet(images, empty, torch.empty(0, dtype=torch.int64, device=device))


def _refuse_empty(splits: Mapping[Split, TensorSet], settings: DataSettings, findings: Findings) -> None:
    shares = {Split.TRAIN: 1.0, Split.VALIDATION: settings.split.validation, Split.TEST: settings.split.test}
    for part, share in shares.items():
        if share > 0 and not len(splits[part]):
            raise DataError(f"no case is left for the {part.value} part{_because(findings)}")


def _because(findings: Findings) -> str:
    reasons = ", ".join(f"{reason} ({count})" for reason, count in findings.quarantined.most_common(5))
    return f": left out: {reasons}" if reasons else ""


class _Statistics:
    """Running counts over the cases that were read."""

    def __init__(self, classes: int) -> None:
        self.patients: set[str] = set()
        self.spacing: tuple[Range, ...] = ()
        self.intensity: Range | None = None
        self._classes = torch.zeros(classes, dtype=torch.float64)
        self._total = 0
        self._attributes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))

    def add(self, example: Example, labels: Tensor, case: Case) -> None:
        self.patients.add(case.patient)
        low, high = float(example.image.min()), float(example.image.max())
        self.intensity = (self.intensity or Range(low, high)).including(low).including(high)
        if example.spacing_mm is not None:
            before = self.spacing or tuple(Range(s, s) for s in example.spacing_mm)
            self.spacing = tuple(r.including(s) for r, s in zip(before, example.spacing_mm, strict=True))
        if labels.is_floating_point():
            self._classes += labels.sum(0).double()
            self._total += len(labels)
        else:
            self._classes += torch.bincount(labels.flatten().long(), minlength=len(self._classes)).double()
            self._total += labels.numel()
        for attribute, value in case.attributes.items():
            self._attributes[attribute][value].add(case.patient)

    def balance(self, spec: DataSpec) -> dict[str, float]:
        shares = (self._classes / max(self._total, 1)).tolist()
        return dict(zip(spec.classes, shares, strict=True))

    def subgroups(self) -> dict[str, Counter[str]]:
        return {
            attribute: Counter({value: len(patients) for value, patients in sorted(values.items())})
            for attribute, values in sorted(self._attributes.items())
        }
