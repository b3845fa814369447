"""BIDS datasets read where they are: files belong together by their folders and by what their names say.

https://bids-specification.readthedocs.io: names are ``entity-value`` pairs and a suffix, parted by underscores.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from medfl.client.data.admission import may_show_face
from medfl.client.data.case import Findings, Quarantine
from medfl.client.data.headers import age_band
from medfl.client.data.names import Contradiction, as_text, meaning_of_values, without_value
from medfl.client.data.nifti_case import NiftiCase
from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import BidsSettings
from medfl.shared.data_spec import DataSpec
from medfl.shared.errors import DataError

_OF_DERIVATIVES = frozenset({"space", "res", "den", "label", "desc", "seg", "atlas", "scale"})
"""Entities that only results have. All others name what a result was made of."""


def find_bids(
    settings: BidsSettings, spec: DataSpec, key: SiteKey, findings: Findings, opted_out: Callable[[str], bool]
) -> list[NiftiCase]:
    """Sessions of a BIDS dataset that have every suffix once and a mask under ``derivatives``.

    Raises:
        DataError: not a BIDS dataset, without subjects, or other channels than the study's.
    """
    if not (settings.folder / "dataset_description.json").is_file():
        raise DataError(f"{settings.folder}: has no dataset_description.json: it is not a BIDS dataset (data.folder)")
    if len(settings.suffixes) != spec.channels:
        raise DataError(f"data.suffixes: names {len(settings.suffixes)} suffixes, the study has {spec.channels}")
    people = _participants(settings.folder / "participants.tsv")
    tables = _Tables(settings, spec, findings.unmatched)
    cases = []
    for session in _sessions(settings):
        subject = session.relative_to(settings.folder).parts[0]
        findings.studies += 1
        try:
            as_text(subject)
            if opted_out(key.pseudonym(subject)):
                raise Quarantine("opted out")
            images = tuple(
                _only(_nifti_files(session, f"_{suffix}"), "a channel is missing") for suffix in settings.suffixes
            )
            findings.series += len(images)
            root, mask = _mask(settings, session)
            findings.labels += 1
            _belong_together(session.relative_to(settings.folder), images, mask)
            words = "" if all("deface" in path.name.lower() for path in images) else "head"  # BIDS is of brains
            cases.append(
                NiftiCase(
                    key.pseudonym(subject),
                    spec,
                    images,
                    mask,
                    aliases=settings.aliases,
                    values=tables.of(mask, root),
                    attributes=people.get(subject, {}),
                    review=may_show_face(spec.modality, words),
                )
            )
        except Quarantine as reason:
            findings.quarantined[str(reason)] += 1
    if not findings.studies:
        raise DataError(f"{settings.folder}: has no folder sub-*: it is not a BIDS dataset (data.folder)")
    return cases


def _sessions(settings: BidsSettings) -> list[Path]:
    """Folders of sessions; a subject's own where it has images of its own, or no sessions."""
    out = []
    for subject in sorted(path for path in settings.folder.glob("sub-*") if path.is_dir()):
        sessions = sorted(path for path in subject.glob("ses-*") if path.is_dir())
        own = any(_nifti_files(subject, f"_{suffix}") for suffix in settings.suffixes)
        out += [*sessions, *([subject] if own or not sessions else [])]
    return out


def _nifti_files(session: Path, ending: str) -> list[Path]:
    return sorted(path for kind in (".nii", ".nii.gz") for path in session.glob(f"*/*{ending}{kind}"))


def _only(found: list[Path], absent: str) -> Path:
    if not found:
        raise Quarantine(absent)
    if len(found) > 1:
        raise Quarantine("several files for one channel or mask")
    return found[0]


def _mask(settings: BidsSettings, session: Path) -> tuple[Path, Path]:
    """The derivative that has the session's mask, and the mask."""
    below = session.relative_to(settings.folder)
    roots = sorted(path for path in (settings.folder / "derivatives").glob("*") if (path / below).is_dir())
    found = {path: root for root in roots for path in _nifti_files(root / below, settings.masks)}
    mask = _only(list(found), "no label")
    return found[mask], mask


def _entities(path: Path) -> dict[str, str]:
    """``entity-value`` pairs of a file's name.

    >>> _entities(Path("sub-01_run-2_T1w.nii.gz"))
    {'sub': '01', 'run': '2'}
    """
    parts = path.name.partition(".")[0].split("_")
    return {entity: value for entity, dash, value in (part.partition("-") for part in parts) if dash}


def _belong_together(below: Path, images: tuple[Path, ...], mask: Path) -> None:
    """Names say what folders say, and the mask was made of one of the images.

    Raises:
        Quarantine: they contradict each other.
    """
    said = dict(part.split("-", 1) for part in below.parts)
    for path in (*images, mask):
        named = _entities(path)
        if any(named.get(entity) != said.get(entity) for entity in ("sub", "ses")):
            raise Quarantine("file named for another subject or session than its folder")
    made_of = {entity: value for entity, value in _entities(mask).items() if entity not in _OF_DERIVATIVES}
    if not any(made_of.items() <= _entities(path).items() for path in images):
        raise Quarantine("mask of another run or acquisition than the image")


@dataclass(slots=True)
class _Tables:
    """What the values of masks mean, where ``dseg.tsv`` files say so (BIDS derivatives, "Discrete segmentations")."""

    settings: BidsSettings
    spec: DataSpec
    unmatched: Counter[str]
    _read: dict[Path, Mapping[int, int]] = field(default_factory=dict)

    def of(self, mask: Path, root: Path) -> Mapping[int, int] | None:
        """Class of each value of ``mask``; None where nothing says, and values are the study's own.

        The nearest table between the mask and ``root`` counts whose name says nothing that the mask's does not.

        Raises:
            Quarantine: two are as near, or one cannot be understood.
        """
        entities, suffix = _entities(mask), mask.name.partition(".")[0].rpartition("_")[2]
        for folder in (mask.parent, *mask.parent.parents):
            found = [
                path
                for path in sorted(folder.glob(f"*{suffix}.tsv"))
                if re.fullmatch(rf"(.*_)?{re.escape(suffix)}\.tsv", path.name)
                and _entities(path).items() <= entities.items()
            ]
            if len(found) > 1:
                raise Quarantine("several tables for one mask")
            if found:
                return self._values(found[0])
            if folder == root:
                break
        return None

    def _values(self, path: Path) -> Mapping[int, int]:
        if path not in self._read:
            rows = _rows(path)
            try:
                labels = {row["name"].strip(): int(row["index"]) for row in rows}
                if not rows or len(labels) < len(rows):
                    raise ValueError
                self._read[path] = meaning_of_values(labels, self.spec, self.settings.aliases, self.unmatched)
            except (Contradiction, KeyError, AttributeError, TypeError, ValueError):
                raise Quarantine("table of a mask's values that cannot be understood") from None
            if without_value(self._read[path], self.spec):
                raise Quarantine("table of a mask's values without a class of the study")
        return self._read[path]


def _rows(path: Path) -> list[dict[str, str]]:
    """Rows of a table with tabs; none where it cannot be read."""
    try:
        return list(csv.DictReader(path.read_text("utf-8-sig").splitlines(), delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def _participants(path: Path) -> dict[str, dict[str, str]]:
    """Sex and age band by subject, where the table has them."""
    out: dict[str, dict[str, str]] = {}
    for row in _rows(path):
        attributes = {}
        if (sex := (row.get("sex") or "").strip().upper()[:1]) in {"F", "M", "O"}:
            attributes["sex"] = sex
        if re.fullmatch(r"\d{1,3}(\.\d+)?", (row.get("age") or "").strip()):
            attributes["age"] = age_band(int(float(row["age"])))
        out[(row.get("participant_id") or "").strip()] = attributes
    return out
