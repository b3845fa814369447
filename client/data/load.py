"""From a site's ``data:`` section to tensors on the training device, split by patient, with a report."""

from __future__ import annotations

import hmac
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from medfl.client.data.cache import EncryptedCache
from medfl.client.data.case import Case, Findings
from medfl.client.data.decoder import end_decoder
from medfl.client.data.headers import HEADER_FIELDS, Progress
from medfl.client.data.ingest import Block, Job, LeftOut, blocks
from medfl.client.data.memo import FileMemo
from medfl.client.data.opt_out import opt_outs, read_list
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
from medfl.client.data.tensors import SiteData, TensorSet, gather, image_bytes
from medfl.shared.data_spec import DataSpec
from medfl.shared.errors import DataError

Task = Literal["segmentation", "classification"]


def load_site_data(
    settings: DataSettings,
    spec: DataSpec,
    *,
    task: Task,
    key: SiteKey,
    cache_key: SiteKey | None = None,
    device: torch.device | str = "cpu",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    room: int | None = None,
) -> SiteData:
    """Find, read, check, preprocess and split the site's cases, and put them on ``device``.

    ``cache_key`` and ``key`` together open the study's cache below ``cache_dir`` (None: ``key`` does). ``room`` is
    how many bytes of images the device may hold; absent: all. Splits that it has no room for, training served first,
    stay in the host's memory.
    A case that cannot be read safely is left out and counted by reason in the report.

    Raises:
        DataError: nothing to train on: no folder, no images, no labels, or too few patients. One line, no file name
            below the configured folder and no patient.
    """
    started = time.monotonic()
    findings = Findings()
    cache, memo = _open_cache(settings, key if cache_key is None else _both(key, cache_key), cache_dir)
    opted_out = opt_outs(read_list(settings.opt_out), settings, key)
    try:
        cases = find_cases(settings, spec, task, key, findings, opted_out, progress, memo)
    finally:
        if memo is not None:
            memo.save()  # reading headers takes hours in a large archive: whatever comes next, they are known
    opted_out.warn()
    if not cases:
        raise _nothing("no case has an image and a label that can be used", findings)
    read = partial(_Reading.of, spec=spec, settings=settings, key=key, cache=cache, memo=memo, progress=progress)
    try:
        found = read(cases)
        if any(not found.kept[part] for part in _wanted(settings)) and found.lost:
            # The few patients of a small site's held-out part cannot be read: others take their place.
            findings.quarantined += found.of_the_lost
            findings.unmatched += found.names_of_the_lost
            found = read([case for case in cases if case.patient not in found.lost])
    except BrokenProcessPool:
        raise DataError(
            "a process that reads images was killed, as happens when memory runs out: lower data.workers, which is "
            f"{settings.workers}; what is cached by now is kept"
        ) from None
    except DataError as error:
        raise _nothing(str(error), findings) from None
    finally:
        end_decoder()
        if cache is not None and memo is not None:
            memo.save()
            cache.evict()
    findings.quarantined += found.quarantined
    findings.unmatched += found.unmatched
    findings.review += found.review
    statistics = found.statistics
    counts = {part: len(found.kept[part]) for part in Split}
    splits = _held(found, spec, task, torch.device(device), room)
    for part in _wanted(settings):
        if not len(splits[part]):
            raise _nothing(f"no case is left for the {part.value} part", findings)
    report = DataReport(
        patients=len(statistics.patients),
        studies=findings.studies,
        series=findings.series,
        labels=findings.labels,
        cases=counts,
        examples={part: len(splits[part]) for part in Split},
        quarantined=dict(findings.quarantined),
        unmatched=dict(findings.unmatched),
        review=dict(findings.review),
        class_balance=statistics.balance(spec),
        spacing_mm=statistics.spacing,
        intensity=statistics.intensity,
        subgroups=statistics.subgroups(),
        held=_where(splits, torch.device(device)),
        opt_outs=opted_out.entries,
        unknown_opt_outs=opted_out.unknown,
        seconds=time.monotonic() - started,
    )
    return SiteData(splits, report, found.pseudonyms, opted_out)


def without_opted_out(data: SiteData, settings: DataSettings, key: SiteKey) -> SiteData:
    """``data`` less the patients who have opted out since it was loaded: to be asked for before every round.

    Itself where the list is as it was. Else what comes back is meant to take its place: images are copied.

    Raises:
        DataError: the list cannot be read, the site's secret is another one, or nobody is left to train on.
    """
    text = read_list(settings.opt_out)
    before = data.opt_outs
    if before is not None and not before.is_by(key):
        raise DataError(
            "the site's secret is not the one that the images were loaded with, so that nobody who opts out would be "
            "found: start the node again"
        )
    if before is not None and before.is_of(text):
        return data
    opted_out = opt_outs(text, settings, key)
    gone = [number for number, pseudonym in enumerate(data.pseudonyms) if opted_out(pseudonym)]
    for pseudonym in before.met if before is not None else ():
        opted_out(pseudonym)
    opted_out.warn()
    splits = {part: found.without(gone) for part, found in data.splits.items()}
    if not len(splits[Split.TRAIN]):
        raise DataError("no patient is left to train on: all have opted out")
    return SiteData(splits, data.report, data.pseudonyms, opted_out)


def find_cases(
    settings: DataSettings,
    spec: DataSpec,
    task: Task,
    key: SiteKey,
    findings: Findings,
    opted_out: Callable[[str], bool],
    progress: Progress | None = None,
    memo: FileMemo | None = None,
) -> Sequence[Case]:
    """Cases of whatever source ``settings`` names; what is left out is counted in ``findings``.

    ``opted_out`` says it of a patient's pseudonym.
    """
    match settings:
        case DicomSettings():
            from medfl.client.data.dicom import find_dicom

            return find_dicom(settings, settings.folder, spec, task, key, findings, opted_out, progress, memo)
        case TableSettings():
            from medfl.client.data.tables import find_pictures

            return find_pictures(settings, spec, task, key, findings, opted_out)
        case NnunetSettings() | BidsSettings() if task != "segmentation":
            raise DataError(f"data.source: {settings.source} has masks only: list the images with source: table")
        case NnunetSettings():
            from medfl.client.data.nnunet import find_nnunet

            return find_nnunet(settings, spec, key, findings, opted_out)
        case BidsSettings():
            from medfl.client.data.bids import find_bids

            return find_bids(settings, spec, key, findings, opted_out)
        case DicomwebSettings() | DimseSettings():
            from medfl.client.data.dicom import find_dicom
            from medfl.client.data.pacs import fetch_all

            fetch_all(settings, key, findings, opted_out, progress)
            return find_dicom(settings, settings.fetch.folder, spec, task, key, findings, opted_out, progress, memo)


def _both(site: SiteKey, study: SiteKey) -> SiteKey:
    """A key that nobody has who has only one of the two: without either, what is cached is unreadable."""
    return SiteKey(hmac.digest(site.derive("cache of a study"), study.material, "sha256"))


def _open_cache(
    settings: DataSettings, key: SiteKey, folder: Path | None
) -> tuple[EncryptedCache | None, FileMemo | None]:
    if folder is None or not settings.cache.enabled:
        return None, None
    cache = EncryptedCache.open(folder, key, int(settings.cache.gigabytes * 1e9))
    versions = [version("medfl"), version("pydicom")]
    context = json.dumps([versions, HEADER_FIELDS, getattr(settings, "series", {})], sort_keys=True)
    return cache, FileMemo.load(cache, context)


def _class_labels(label: frozenset[int] | None, spec: DataSpec, rows: int) -> Tensor:
    assert label is not None  # noqa: S101 - a source gives a mask or a class
    if spec.multi_label:
        row = torch.zeros(len(spec.classes))
        row[sorted(label)] = 1
        return row.repeat(rows, 1)
    (index,) = label
    return torch.full((rows,), index, dtype=torch.int64)


def _held(
    found: _Reading, spec: DataSpec, task: Task, device: torch.device, room: int | None
) -> dict[Split, TensorSet]:
    splits = {}
    for part in Split:  # training comes first
        size = image_bytes(found.kept[part]) if found.kept[part] else 0
        fits = room is None or size <= room
        if room is not None and fits:
            room -= size
        splits[part] = _tensor_set(found.kept[part], spec, task, device, streamed=not fits)
    return splits


def _where(splits: Mapping[Split, TensorSet], device: torch.device) -> str:
    sizes = {True: 0, False: 0}
    for part in splits.values():
        sizes[part.streamed] += part.images.numel() * part.images.element_size()
    text = f"{sizes[False] / 1e6:.0f} MB of images on {device.type}"
    return text + (f", {sizes[True] / 1e6:.0f} MB in the host's memory" if sizes[True] else "")


def _tensor_set(
    blocks: list[tuple[Tensor, Tensor, int]], spec: DataSpec, task: Task, device: torch.device, *, streamed: bool
) -> TensorSet:
    if blocks:
        return gather(blocks, device, streamed=streamed)
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


def _wanted(settings: DataSettings) -> list[Split]:
    """Parts that must not be empty."""
    shares = {Split.TRAIN: 1.0, Split.VALIDATION: settings.split.validation, Split.TEST: settings.split.test}
    return [part for part, share in shares.items() if share > 0]


def _nothing(text: str, findings: Findings) -> DataError:
    """``text`` and the commonest reasons. Names of segments are a note: what is typed in by hand stays out of logs."""
    reasons = ", ".join(f"{reason} ({count})" for reason, count in findings.quarantined.most_common(5))
    error = DataError(f"{text}: left out: {reasons}" if reasons else text)
    for name, count in findings.unmatched.most_common(20):
        error.add_note(f"{count:6d}  {name!r}")
    return error


@dataclass(slots=True)
class _Reading:
    """Cases that were read, by the part of their patient, and what was seen on the way."""

    pseudonyms: tuple[str, ...]  # by the patient's number
    statistics: _Statistics
    kept: dict[Split, list[tuple[Tensor, Tensor, int]]] = field(default_factory=lambda: defaultdict(list))
    quarantined: Counter[str] = field(default_factory=Counter)
    unmatched: Counter[str] = field(default_factory=Counter)
    review: Counter[str] = field(default_factory=Counter)
    lost: set[str] = field(default_factory=set)  # patients without any case that can be read
    of_the_lost: Counter[str] = field(default_factory=Counter)  # why
    names_of_the_lost: Counter[str] = field(default_factory=Counter)  # of their segments that are no class

    @classmethod
    def of(
        cls,
        cases: Sequence[Case],
        *,
        spec: DataSpec,
        settings: DataSettings,
        key: SiteKey,
        cache: EncryptedCache | None,
        memo: FileMemo | None,
        progress: Progress | None,
    ) -> _Reading:
        """Split the patients of ``cases`` and read all of them.

        Raises:
            DataError: too few patients.
        """
        parts = split_patients({case.patient for case in cases}, key, settings.split)
        out = cls(tuple(sorted(parts)), _Statistics(len(spec.classes)))
        numbers = {patient: number for number, patient in enumerate(out.pseudonyms)}
        jobs = [Job(case, spec, parts[case.patient] is not Split.TRAIN) for case in cases]
        left_out: list[tuple[str, LeftOut]] = []
        for done, (case, block) in enumerate(zip(cases, blocks(jobs, settings.workers, cache, memo), strict=True)):
            if progress:
                progress("reading images", done, len(cases))
            if isinstance(block, LeftOut):
                left_out.append((case.patient, block))
                out.unmatched.update(block.unmatched)
                continue
            labels = block.masks if block.masks is not None else _class_labels(block.label, spec, len(block.images))
            out.kept[parts[case.patient]].append((block.images, labels, numbers[case.patient]))
            out.statistics.add(block, labels, case)
            out.unmatched.update(block.unmatched)
            out.review.update(block.review)
        if progress:
            progress("reading images", len(cases), len(cases))
        out.quarantined.update(why.reason for _, why in left_out)
        out.lost = set(parts) - out.statistics.patients
        for why in (why for patient, why in left_out if patient in out.lost):
            out.of_the_lost[why.reason] += 1
            out.names_of_the_lost.update(why.unmatched)
        return out


class _Statistics:
    """Running counts over the cases that were read."""

    def __init__(self, classes: int) -> None:
        self.patients: set[str] = set()
        self.spacing: tuple[Range, ...] = ()
        self.intensity: Range | None = None
        self._classes = torch.zeros(classes, dtype=torch.float64)
        self._total = 0
        self._attributes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))

    def add(self, block: Block, labels: Tensor, case: Case) -> None:
        self.patients.add(case.patient)
        low, high = block.intensity
        self.intensity = (self.intensity or Range(low, high)).including(low).including(high)
        if block.spacing_mm is not None:
            before = self.spacing or tuple(Range(s, s) for s in block.spacing_mm)
            self.spacing = tuple(r.including(s) for r, s in zip(before, block.spacing_mm, strict=True))
        if labels.is_floating_point():
            self._classes += labels.sum(0).double()
            self._total += len(labels)
        else:
            self._classes += torch.bincount(labels.flatten(), minlength=len(self._classes)).double()
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
