"""The ``data:`` section of site.yaml: where the images and labels lie, how segments are called here, how to split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medfl.shared.config import LocalPath, Settings


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


class _Common(Settings):
    aliases: dict[str, str] = Field(default_factory=dict)  # name of a segment here -> name in the study
    split: SplitSettings = SplitSettings()
    opt_out: LocalPath | None = None  # text file, one patient identifier a line; read again before every round


class DicomSettings(_Common):
    """A folder of DICOM files, searched to any depth; names of files do not matter."""

    source: Literal["dicom"]
    folder: LocalPath


class TableSettings(_Common):
    """A CSV file with one picture a row: columns ``patient``, ``image``, and ``mask`` or ``label``; ``site`` may be."""

    source: Literal["table"]
    file: LocalPath
    folder: LocalPath | None = None  # root of the names in ``image`` and ``mask``; absent: the table's own folder
    site: str | None = None  # keep only rows with this value in column ``site``


DataSettings = Annotated[DicomSettings | TableSettings, Field(discriminator="source")]
"""Any of the sources, told apart by ``source:``."""
