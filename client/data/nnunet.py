"""nnU-Net v2 datasets read where they are: what ``dataset.json`` says, and nothing that it does not."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfl.client.data.admission import may_show_face
from medfl.client.data.case import Findings, Quarantine
from medfl.client.data.names import Contradiction, aliased, as_text, meaning_of_values, without_value
from medfl.client.data.nifti_case import NiftiCase
from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import NnunetSettings
from medfl.shared.data_spec import DataSpec, plain
from medfl.shared.errors import DataError

_MAX_JSON_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Dataset:
    """What ``dataset.json`` says."""

    channels: tuple[int, ...]  # numbers, in the order of the study's channels
    values: Mapping[int, int]  # of a mask -> class
    ending: str  # of every file's name
    review: frozenset[str]


def find_nnunet(
    settings: NnunetSettings, spec: DataSpec, key: SiteKey, findings: Findings, opted_out: Callable[[str], bool]
) -> list[NiftiCase]:
    """Training cases of an nnU-Net v2 dataset.

    Channels are found by the names that the study's ``series`` gives them; where it gives none, by their numbers.

    Raises:
        DataError: no readable ``dataset.json``, regions instead of labels, a class without a label, other channels than
            the study's, or no files.
    """
    dataset = _description(settings, spec, findings)
    masks = {_name(path, dataset.ending): path for path in _files(settings.folder / "labelsTr", dataset.ending)}
    numbers: dict[str, set[int]] = defaultdict(set)
    for path in _files(settings.folder / "imagesTr", dataset.ending):
        if match := re.fullmatch(r"(.+)_(\d{4})", _name(path, dataset.ending)):
            numbers[match[1]].add(int(match[2]))
    if not masks or not numbers:
        raise DataError(f"{settings.folder}: no {dataset.ending} file in {'imagesTr' if masks else 'labelsTr'}")
    cases = []
    for name in sorted(masks.keys() | numbers.keys()):
        images = tuple(
            settings.folder / "imagesTr" / f"{name}_{number:04d}{dataset.ending}" for number in dataset.channels
        )
        findings.studies += 1
        findings.series += len(numbers[name])
        findings.labels += name in masks
        try:
            match = re.fullmatch(settings.patient, name)
            if match is None or not match[1]:
                raise Quarantine("case whose name has no patient (data.patient)")
            patient = key.pseudonym(as_text(match[1]))
            if opted_out(patient):
                raise Quarantine("opted out")
            if name not in masks:
                raise Quarantine("no label")
            if not numbers[name] >= set(dataset.channels):
                raise Quarantine("a channel is missing")
            if numbers[name] > set(dataset.channels):
                raise Quarantine("more channels than dataset.json names")
            cases.append(
                NiftiCase(
                    patient,
                    spec,
                    images,
                    masks[name],
                    aliases=settings.aliases,
                    values=dataset.values,
                    review=dataset.review,
                )
            )
        except Quarantine as reason:
            findings.quarantined[str(reason)] += 1
    return cases


def _files(folder: Path, ending: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{ending}") if not path.name.startswith("."))


def _name(path: Path, ending: str) -> str:
    return path.name.removesuffix(ending)


def _description(settings: NnunetSettings, spec: DataSpec, findings: Findings) -> _Dataset:
    content = _json(settings.folder / "dataset.json")
    where = f"{settings.folder}: dataset.json"
    try:
        names = {int(number): str(name) for number, name in content["channel_names"].items()}
        labels = {str(name): value for name, value in content["labels"].items()}
        ending = str(content["file_ending"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{where} is not of nnU-Net v2: it needs channel_names, labels and file_ending") from None
    if ending not in {".nii", ".nii.gz"}:
        raise DataError(f"{where}: file_ending must be .nii or .nii.gz")
    if sorted(names) != list(range(len(names))):
        raise DataError(f"{where}: channel_names must be numbered 0, 1, 2 and so on")
    if len(names) != spec.channels:
        raise DataError(f"{settings.folder}: has {len(names)} channels, but the study has {spec.channels}")
    if regions := [name for name, value in labels.items() if isinstance(value, list)]:
        raise DataError(f"{where}: label {regions[0]!r} is a region, which is not supported")
    try:
        values = meaning_of_values(labels, spec, settings.aliases, findings.unmatched)
    except Contradiction as why:
        raise DataError(f"{where}: {why}") from None
    if absent := without_value(values, spec):
        raise DataError(
            f"{where}: no label is the study's class {absent[0]!r}, and without one its voxels would "
            "count as background: say in data.aliases what it is called here"
        )
    texts = [str(content.get(field) or "") for field in ("name", "description")]
    return _Dataset(_order(settings, spec, names), values, ending, may_show_face(spec.modality, " ".join(texts)))


def _order(settings: NnunetSettings, spec: DataSpec, names: Mapping[int, str]) -> tuple[int, ...]:
    """Numbers of the dataset's channels in the order of the study's."""
    if not spec.series:
        return tuple(sorted(names))
    found = {plain(aliased(name, settings.aliases)): number for number, name in names.items()}
    try:
        return tuple(found[plain(name)] for name in spec.series)
    except KeyError:
        raise DataError(
            f"{settings.folder}: dataset.json calls its channels {', '.join(names.values())}, the study "
            f"{', '.join(spec.series)}: say in data.aliases which is which"
        ) from None


def _json(path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise DataError(f"{path}: has one key twice")
        return dict(pairs)

    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise DataError(f"{path}: is too large")
        content = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=once)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is not valid JSON") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not valid JSON for a dataset")
    return content
