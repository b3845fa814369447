"""Pictures and NIfTI files listed in a CSV file: columns ``patient``, ``image``, and ``mask`` or ``label``."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medfl.client.data.admission import may_show_text
from medfl.client.data.case import Example, Findings, Quarantine
from medfl.client.data.names import Meaning, class_named, class_of_number
from medfl.client.data.nifti_case import NiftiCase
from medfl.client.data.pictures import read_mask, read_picture
from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import TableSettings
from medfl.shared.data_spec import DataSpec, plain
from medfl.shared.errors import DataError

Task = Literal["segmentation", "classification"]
Row = Mapping[str, str | None]

_SURPLUS = "\0"  # column of the cells that stand beyond the last column


@dataclass(frozen=True, slots=True)
class PictureCase:
    """One row: a picture with its mask or its classes."""

    patient: str
    spec: DataSpec = field(repr=False)
    image: Path = field(repr=False)
    mask: Path | None = field(default=None, repr=False)
    label: frozenset[int] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict, repr=False)
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def images(self) -> tuple[Path, ...]:
        """The picture."""
        return (self.image,)

    @property
    def files(self) -> tuple[Path, ...]:
        """What the case is read from."""
        return (self.image,) if self.mask is None else (self.image, self.mask)

    @property
    def fingerprint(self) -> str:
        """The classes and the aliases."""
        return repr((self.label and sorted(self.label), sorted(self.aliases.items())))

    def read(self) -> Example:
        """Decode picture and mask (see :func:`read_picture`, :func:`read_mask`)."""
        image = read_picture(self.image, self.spec)
        meaning = Meaning(self.spec, self.aliases, white=True)
        mask = read_mask(self.mask, meaning, image.shape[1:]) if self.mask is not None else None
        return Example(image, None, mask, self.label, may_show_text(self.spec.modality))


def find_pictures(
    settings: TableSettings,
    spec: DataSpec,
    task: Task,
    key: SiteKey,
    findings: Findings,
    opted_out: Callable[[str], bool],
) -> list[PictureCase | NiftiCase]:
    """Rows of the table that this site can use, in the table's order.

    Raises:
        DataError: no table, a column is missing, or no row is this site's.
    """
    rows, columns = read_rows(settings.file)
    wanted = "mask" if task == "segmentation" else "label"
    for column in ("patient", *(spec.series or ("image",)), wanted):
        if column not in columns:
            raise DataError(f"{settings.file}: has no column {column!r}, which {task} needs")
    if settings.site is not None:
        if "site" not in columns:
            raise DataError(f"{settings.file}: has no column 'site', but data.site is set: remove it or add the column")
        rows = [row for row in rows if (row["site"] or "").strip() == settings.site]
        if not rows:
            raise DataError(f"{settings.file}: no row has {settings.site!r} in column 'site' (data.site)")
    root = (settings.folder or settings.file.parent).resolve()
    cases: list[PictureCase | NiftiCase] = []
    for row in rows:
        findings.series += 1
        try:
            cases.append(_case(row, root, wanted, spec, settings, key, findings, opted_out))
        except Quarantine as reason:
            findings.quarantined[str(reason)] += 1
    findings.studies = len(rows)
    return _each_once(cases, findings)


def _each_once(cases: Sequence[PictureCase | NiftiCase], findings: Findings) -> list[PictureCase | NiftiCase]:
    """``cases`` without rows that are there again, and without images of which two rows say different things."""
    rows: dict[Path, list[PictureCase | NiftiCase]] = defaultdict(list)
    for case in cases:
        rows[case.images[0]].append(case)
    out = []
    for same in rows.values():
        if any(case != same[0] for case in same):
            findings.quarantined["one image with two patients or labels"] += len(same)
            continue
        out.append(same[0])
        if len(same) > 1:
            findings.quarantined["copy of another row"] += len(same) - 1
    return out


def _case(
    row: Row,
    root: Path,
    wanted: str,
    spec: DataSpec,
    settings: TableSettings,
    key: SiteKey,
    findings: Findings,
    opted_out: Callable[[str], bool],
) -> PictureCase | NiftiCase:
    if not is_whole(row):
        raise Quarantine("row with more cells than columns")
    columns = spec.series or ("image",)
    patient, label = ((row.get(column) or "").strip() for column in ("patient", wanted))
    if not patient:
        raise Quarantine("no patient identifier")
    if opted_out(key.pseudonym(patient)):
        raise Quarantine("opted out")
    if not label:
        raise Quarantine("no label")
    findings.labels += 1
    images = tuple(_inside(root, (row.get(column) or "").strip()) for column in columns)
    mask = _inside(root, label) if wanted == "mask" else None
    classes = classes_of(label, spec, settings.aliases) if mask is None else None
    if all(path.name.lower().endswith((".nii", ".nii.gz")) for path in images):
        return NiftiCase(key.pseudonym(patient), spec, images, mask, classes, settings.aliases)
    if len(images) > 1 or spec.dimensions == 3:
        raise Quarantine("picture where the study needs a volume")
    return PictureCase(key.pseudonym(patient), spec, images[0], mask, classes, settings.aliases)


def classes_of(text: str, spec: DataSpec, aliases: Mapping[str, str]) -> frozenset[int]:
    """Class indices that a cell of a label column names: a class's name or index; ``a|b`` for several, ``-`` for none.

    Raises:
        Quarantine: no class of the study, or several where the study allows one.
    """
    if spec.multi_label and text == "-":
        return frozenset()
    found = set()
    for part in text.split("|") if spec.multi_label else [text]:
        name = part.strip()
        index = class_named(name, spec, aliases)
        if index is None and re.fullmatch(r"-?[0-9]+", plain(name)):
            index = class_of_number(int(plain(name)), spec, aliases)
        if index is None:
            raise Quarantine("label that is no class of the study")
        found.add(index)
    return frozenset(found)


def _inside(root: Path, name: str) -> Path:
    """File ``name`` under ``root``; a table must not lead out of the site's folder."""
    try:
        path = (root / name.replace("\\", "/")).resolve()
        inside, there = path.is_relative_to(root), path.is_file()
    except (OSError, ValueError):  # too long, or with a character that no name can have
        raise Quarantine("file is missing") from None
    if not name or not inside:
        raise Quarantine("file name leads out of the folder")
    if not there:
        raise Quarantine("file is missing")
    return path


def is_whole(row: Row) -> bool:
    """Whether no cell stands beyond the last column: a comma inside of one shifts all that follow."""
    return not any(row.get(_SURPLUS) or ())


def read_rows(path: Path) -> tuple[list[dict[str, str | None]], list[str]]:
    """Rows and column names of a CSV file (commas, semicolons or tabs, UTF-8 with or without a byte order mark).

    Raises:
        DataError: it cannot be read, or has no rows.
    """
    try:
        text = path.read_text("utf-8-sig")  # Excel writes a byte order mark
    except OSError as error:
        raise DataError(f"{path}: the table cannot be read ({error.strerror}): see data.file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: the table is not UTF-8 text: save it as 'CSV UTF-8'") from None
    first = text.partition("\n")[0]
    # Strict: else a quote that does not close swallows all rows that follow.
    reader = csv.DictReader(io.StringIO(text), restkey=_SURPLUS, delimiter=max(",;\t", key=first.count), strict=True)
    try:
        reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or []]
        rows = list(reader)
    except csv.Error:
        raise DataError(f"{path}: the table is not valid CSV (line {reader.line_num})") from None
    if not rows:
        raise DataError(f"{path}: the table has no rows")
    if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise DataError(f"{path}: has two columns {twice[0]!r}")
    return rows, columns
