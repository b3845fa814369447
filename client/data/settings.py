"""The ``data:`` section of site.yaml: where images and labels lie, how things are called here, how to split."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from medfl.shared.config import LocalPath, Settings
from medfl.shared.data_spec import plain

Key = Literal["patient", "study", "series", "instance", "file"]  # file: its name under ``folder``


class SplitSettings(Settings):
    """Parts of the patients that are held out. Stays the same for as long as the site's secret does."""

    validation: float = Field(default=0.15, ge=0, lt=1)
    test: float = Field(default=0.15, ge=0, lt=1)
    min_patients: int = Field(default=10, ge=3)  # with fewer, the site does not take part

    @model_validator(mode="after")
    def _leaves_training(self) -> SplitSettings:
        if self.validation + self.test >= 0.9:
            raise ValueError("validation and test together must stay below 0.9, so that something is left to train on")
        return self


class CacheSettings(Settings):
    """Preprocessed examples on disk, encrypted with a key that comes from the site's secret."""

    enabled: bool = True
    gigabytes: float = Field(default=20.0, gt=0)  # the least recently used are deleted first


class _Common(Settings):
    aliases: dict[str, str] = Field(default_factory=dict)  # name of a segment or class here -> name in the study
    split: SplitSettings = SplitSettings()
    opt_out: LocalPath | None = None  # text file, one patient identifier a line; read before every round
    cache: CacheSettings = CacheSettings()
    workers: int = Field(default=1, ge=1, le=256)  # processes that decode; each holds one case in memory

    @field_validator("aliases")
    @classmethod
    def _lead_to_one_name(cls, aliases: dict[str, str]) -> dict[str, str]:
        meant: dict[str, str] = {}
        for here, there in aliases.items():
            if plain(meant.setdefault(plain(here), there)) != plain(there):
                raise ValueError(f"{here!r} leads to two names: case, spaces and punctuation do not matter")
        return aliases


class ObjectLabels(Settings):
    """DICOM SEG and RTSTRUCT objects that lie among the images and name their series."""

    kind: Literal["objects"] = "objects"


class TableLabels(Settings):
    """A CSV file with one class (or several) for each patient, study, series or image (SOP instance)."""

    kind: Literal["table"]
    file: LocalPath
    key: Key = "patient"
    key_column: str = ""  # absent: the name in ``key``
    label_column: str = "label"


class NiftiLabels(Settings):
    """A folder of masks on the images' grids, named by identifier: ``<patient or series identifier>.nii.gz``."""

    kind: Literal["nifti"]
    folder: LocalPath
    key: Key = "series"


LabelSettings = Annotated[ObjectLabels | TableLabels | NiftiLabels, Field(discriminator="kind")]


class _Dicom(_Common):
    labels: LabelSettings = ObjectLabels()
    series: dict[str, str] = Field(default_factory=dict)  # channel -> pattern of its description

    @field_validator("series")
    @classmethod
    def _compiles(cls, series: dict[str, str]) -> dict[str, str]:
        for channel, pattern in series.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{channel} is not a regular expression ({error.msg})") from None
        return series


class DicomSettings(_Dicom):
    """A folder of DICOM files, searched to any depth; names of files do not matter."""

    source: Literal["dicom"]
    folder: LocalPath


class TableSettings(_Common):
    """A CSV file with one PNG, TIFF, JPEG or NIfTI image a row: columns ``patient``, ``image``, ``mask`` or ``label``.

    A study of several channels may have a column for each, named as in ``data.series`` of the study.
    """

    source: Literal["table"]
    file: LocalPath
    folder: LocalPath | None = None  # root of the names in the table; absent: the table's own folder
    site: str | None = None  # keep only rows with this value in column ``site``


class NnunetSettings(_Common):
    """An nnU-Net v2 dataset: ``dataset.json``, ``imagesTr/CASE_0000.nii.gz``, ``labelsTr/CASE.nii.gz``."""

    source: Literal["nnunet"]
    folder: LocalPath
    patient: str = r"(.+)"  # regular expression on the case's name; its first group is the patient

    @field_validator("patient")
    @classmethod
    def _one_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"is not a regular expression ({error.msg})") from None
        if groups < 1:
            raise ValueError("must have a group in parentheses: the patient's part of the case's name")
        return pattern


class BidsSettings(_Common):
    """A BIDS dataset: ``sub-*/[ses-*/]<datatype>/*_<suffix>.nii.gz``, masks under ``derivatives``."""

    source: Literal["bids"]
    folder: LocalPath
    suffixes: tuple[str, ...] = Field(default=("T1w",), min_length=1)  # one for each channel of the study
    masks: str = "_dseg"  # ending of the mask's name before .nii.gz


class Query(Settings):
    """Which studies to fetch from the PACS. Fields that are absent do not restrict."""

    modality: str = Field(pattern=r"^[A-Z]{2}$")
    body_part: str | None = None
    study_description: str | None = None  # wildcards * and ?
    from_date: str | None = Field(default=None, pattern=r"^\d{8}$")  # YYYYMMDD
    to_date: str | None = Field(default=None, pattern=r"^\d{8}$")
    max_studies: int = Field(default=10_000, ge=1)


class FetchSettings(Settings):
    """How gently to fetch. A clinical PACS is never loaded by research."""

    folder: LocalPath  # what was fetched stays here (mode 0700)
    instances_per_minute: int = Field(default=600, ge=1)
    hours: str | None = Field(default=None, pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")  # local time
    attempts: int = Field(default=3, ge=1, le=20)  # for each series
    timeout_s: float = Field(default=30.0, gt=0)


class DicomwebSettings(_Dicom):
    """A PACS that speaks DICOMweb: QIDO-RS to find, WADO-RS to fetch."""

    source: Literal["dicomweb"]
    url: str = Field(pattern=r"^https?://")
    user: str | None = None
    password: str | None = Field(default=None, repr=False)  # write it as file:PATH or ${NAME}
    token_file: LocalPath | None = None  # a bearer token instead, that only its owner can read; read at every request
    ca_file: LocalPath | None = None
    query: Query
    fetch: FetchSettings

    @model_validator(mode="after")
    def _no_password_in_the_clear(self) -> DicomwebSettings:
        url = urlsplit(self.url)
        secret = "password" if self.password is not None else "token" if self.token_file is not None else None
        if secret and url.scheme == "http" and url.hostname not in {"127.0.0.1", "localhost", "::1"}:
            raise ValueError(f"url must begin with https, or the {secret} would cross the network in the clear")
        if self.token_file is not None and self.user is not None:
            raise ValueError("user and token_file are two ways to sign in: give one")
        return self


class DicomTls(Settings):
    """DICOM over TLS (PS3.15 B.9 and later): both ends show certificates. Without it images cross in the clear."""

    ca_file: LocalPath  # who has signed the PACS's certificate
    certificate: LocalPath  # this station's own, PEM
    key: LocalPath
    server_name: str | None = None  # name in the PACS's certificate; absent: ``host``


class DimseSettings(_Dicom):
    """A PACS that speaks DIMSE: C-FIND to find, C-GET or C-MOVE to fetch.

    C-MOVE makes the PACS connect to ``port`` of this machine: its administrator must register ``ae_title``, this
    host and the port. C-GET needs no inbound connection, but many PACS refuse it.
    """

    source: Literal["dimse"]
    host: str
    pacs_port: int = Field(ge=1, le=65535)
    called_ae_title: str = Field(min_length=1, max_length=16)
    ae_title: str = Field(default="MEDFL", min_length=1, max_length=16)
    retrieve: Literal["get", "move"] = "get"
    bind: str = "127.0.0.1"  # address of this machine on which to listen for C-MOVE
    port: int | None = Field(default=None, ge=1, le=65535)
    tls: DicomTls | None = None
    query: Query
    fetch: FetchSettings

    @model_validator(mode="after")
    def _move_needs_a_port(self) -> DimseSettings:
        if (self.retrieve == "move") != (self.port is not None):
            raise ValueError("port must be given with retrieve: move, and only then")
        return self


DataSettings = Annotated[
    DicomSettings | TableSettings | NnunetSettings | BidsSettings | DicomwebSettings | DimseSettings,
    Field(discriminator="source"),
]
"""Any of the sources, told apart by ``source:``."""
