"""What a study is trained on: kind of image, classes, preprocessing. Data that crosses the wire: no path, no code."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from medfl.shared.config import Settings

_ORIENTATION = re.compile(r"(?=.*[LR])(?=.*[AP])(?=.*[HF])[LRAPHF]{3}")
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.[0-9]{1,18})?")
_MAX_EXTENT = 4096

Label = Annotated[str, Field(min_length=1, max_length=64)]
Extent = Annotated[int, Field(ge=4, le=_MAX_EXTENT)]
Millimetres = Annotated[float, Field(gt=0, le=100)]


class Modality(StrEnum):
    """Kind of image, which decides what raw values mean."""

    CT = "ct"  # Hounsfield units
    MR = "mr"  # arbitrary units: use zscore
    XRAY = "xray"  # CR, DX or PNG; brighter is denser
    MAMMOGRAPHY = "mammography"
    ULTRASOUND = "ultrasound"
    FUNDUS = "fundus"  # colour photograph of the retina
    PET = "pet"  # standardised uptake value
    PHOTO = "photo"  # any other 8-bit picture


class Normalise(StrEnum):
    """How raw values become network input."""

    WINDOW = "window"  # clip to ``window``, then to 0..1
    ZSCORE = "zscore"  # per image or volume and channel: mean 0, standard deviation 1
    MINMAX = "minmax"  # per image or volume and channel: to 0..1
    SCALE_255 = "scale_255"  # divide by 255: 8-bit pictures
    NONE = "none"


class Fit(StrEnum):
    """How an image comes to ``size``."""

    CROP_PAD = "crop_pad"  # about the centre, at the resampled spacing
    RESIZE = "resize"  # stretch, whatever the spacing


class Slices(Settings):
    """Which slices of a volume a 2D study trains on. Deterministic: nothing here is drawn.

    ``per_case`` slices are taken from each training volume: as near as possible ``foreground`` of them from the slices
    with foreground, evenly spaced, the rest evenly spaced among the others. Held-out volumes give every slice
    (``held_out: all``), so that no score depends on where the labels say the finding is.
    """

    per_case: int | None = Field(default=None, ge=1, le=_MAX_EXTENT)  # absent: all
    foreground: float = Field(default=0.67, ge=0, le=1)
    held_out: Literal["all", "same"] = "all"


class Preprocessing(Settings):
    """From raw values to network input. Lengths of ``size`` and ``spacing_mm`` equal the study's dimensions."""

    orientation: str = "HPL"  # direction of growing index along (slice, row, column): Head, Posterior, Left...
    spacing_mm: tuple[Millimetres, ...] | None = None  # (slice,) row, column; absent: as acquired
    normalise: Normalise
    window: tuple[float, float] | None = None  # raw units, for normalise: window
    size: tuple[Extent, ...]  # (slices,) rows, columns
    fit: Fit = Fit.CROP_PAD
    slices: Slices = Slices()

    @model_validator(mode="after")
    def _consistent(self) -> Preprocessing:
        if not _ORIENTATION.fullmatch(self.orientation):
            raise ValueError("orientation must be three letters, one each of L|R, A|P and H|F, such as HPL")
        if (self.normalise is Normalise.WINDOW) != (self.window is not None):
            raise ValueError("window must be given with normalise: window, and only then")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError("window must be [low, high] with low below high")
        return self


class Augmentation(Settings):
    """Random changes of training images, drawn for each image of a batch. All off unless asked for."""

    flip: bool = False  # each in-plane axis with probability 1/2; not for studies in which left and right matter
    rotate_degrees: float = Field(default=0.0, ge=0, le=180)  # in-plane, uniform in -x..x
    scale: float = Field(default=0.0, ge=0, lt=1)  # size times uniform in 1-x..1+x
    intensity: float = Field(default=0.0, ge=0, le=1)  # contrast times 1-x..1+x, brightness plus -x..x, of input units
    noise: float = Field(default=0.0, ge=0, le=1)  # Gaussian, standard deviation uniform in 0..x, of input units
    bias_field: float = Field(default=0.0, ge=0, le=1)  # smooth field between 1-x and 1+x, multiplied
    elastic: float = Field(default=0.0, ge=0, le=0.2)  # smooth displacement, standard deviation as part of the extent


class DataSpec(Settings):
    """The images and labels a study needs. ``classes[0]`` is the background of a segmentation.

    ``label_map`` says which class a segment or region of interest is (names compare without case and punctuation);
    a name equal to a class needs no entry. ``series`` names the channels where each comes from its own series.
    """

    modality: Modality
    dimensions: Literal[2, 3]
    channels: int = Field(default=1, ge=1, le=16)
    series: tuple[Label, ...] = ()  # for example (t1, t2): one name for each channel
    classes: tuple[Label, ...] = Field(min_length=2, max_length=256)
    multi_label: bool = False  # classification: an image may have several classes, or none
    label_map: dict[Label, Label] = Field(default_factory=dict)
    preprocessing: Preprocessing
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _consistent(self) -> DataSpec:
        if not all(map(plain, self.classes)) or len(set(map(plain, self.classes))) != len(self.classes):
            raise ValueError("classes must differ from each other in their letters and digits")
        if any("/" in name or not name.isprintable() for name in self.classes):
            raise ValueError("classes must be of printable characters without a slash, which parts the names of scores")
        if unknown := sorted(set(self.label_map.values()) - set(self.classes)):
            raise ValueError(f"label_map leads to {unknown[0]!r}, which is not among classes")
        meant: dict[str, str] = {}
        for name, label in self.label_map.items():
            if meant.setdefault(plain(name), label) != label:
                raise ValueError(f"label_map leads from {name!r} to two classes")
        if self.series and len(self.series) != self.channels:
            raise ValueError("series must name as many series as there are channels")
        if len(set(self.series)) != len(self.series):
            raise ValueError("series must differ from each other")
        if len(self.preprocessing.size) != self.dimensions:
            raise ValueError(f"preprocessing.size must have {self.dimensions} lengths, one for each dimension")
        spacing = self.preprocessing.spacing_mm
        if spacing is not None and len(spacing) != self.dimensions:
            raise ValueError(f"preprocessing.spacing_mm must have {self.dimensions} values, one for each dimension")
        return self

    def class_of(self, name: str) -> int | None:
        """Index of the class that a segment or region called ``name`` is, or None when the study does not use it.

        >>> DataSpec(modality="ct", dimensions=2, classes=("background", "lesion"), label_map={"GTV-1": "lesion"},
        ...     preprocessing={"normalise": "zscore", "size": (64, 64)}).class_of("gtv 1")
        1
        """
        wanted = plain(name)
        for source, label in self.label_map.items():
            if plain(source) == wanted:
                return self.classes.index(label)
        return next((index for index, label in enumerate(self.classes) if plain(label) == wanted), None)


def plain(name: str) -> str:
    """``name`` without case, spaces and punctuation: how names of segments compare. What changes a meaning stays.

    >>> plain("GTV-1") == plain("gtv 1"), plain("HER2+") == plain("HER2-"), plain("-1") == plain("1")
    (True, False, False)
    """
    text = unicodedata.normalize("NFC", name).casefold().strip()
    if _NUMBER.fullmatch(text):  # 1.0 is 1, and neither -1 nor 10
        return f"{Decimal(text).normalize():f}"
    return "".join(letter for letter in text if letter.isalnum() or letter in "+<>") + "-" * text.endswith("-")
