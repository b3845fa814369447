"""One example before it is a tensor: what a source finds, what reading it gives, and why it may be left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Quarantine(Exception):
    """A case cannot be read safely and is left out. ``str`` is a short stable reason that is counted and shown;
    it never holds a name, an identifier or a value from the file. ``unmatched`` are the names of its segments where
    none is a class of the study: for this site's own people only. ``passing``: it may be read another time, since the
    disk or the memory failed and not the file; nothing remembers that.
    """

    def __init__(self, reason: str, unmatched: tuple[str, ...] = (), *, passing: bool = False) -> None:
        super().__init__(reason)
        self.unmatched = unmatched
        self.passing = passing


@dataclass(frozen=True)
class Example:
    """A case as read: raw values, oriented as the study says, labels on the same grid.

    ``image`` is (channel, *spatial) float32; ``mask`` is (*spatial) uint8 class index. ``label`` is the class of the
    whole image, several for multi-label studies. ``spacing_mm`` runs along spatial, or is None where unknown.
    """

    image: NDArray[np.float32]
    spacing_mm: tuple[float, ...] | None
    mask: NDArray[np.uint8] | None = None
    label: frozenset[int] | None = None
    review: frozenset[str] = frozenset()  # things that a person should look at, such as possible burned-in text
    unmatched: tuple[str, ...] = ()  # names of segments that are no class of the study

    @cached_property
    def intensity(self) -> tuple[float, float]:
        """Lowest and highest raw value; not finite where any value is not."""
        return float(self.image.min()), float(self.image.max())


class Case(Protocol):
    """An example that can be read. Holds paths and pseudonyms only, so that it can be sent to a worker process."""

    @property
    def patient(self) -> str:
        """Pseudonym of the patient at this site."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that the case is read from."""

    @property
    def fingerprint(self) -> str:
        """What the case is besides the content of its files: its classes, names it goes by, how to read it."""

    @property
    def attributes(self) -> Mapping[str, str]:
        """Subgroup attributes from the allow-list, such as sex, age band, manufacturer. Never leave the site."""

    def read(self) -> Example:
        """Read and decode.

        Raises:
            Quarantine: the case cannot be read safely.
        """


@dataclass(slots=True)
class Findings:
    """What a source saw on its way: counts only."""

    studies: int = 0
    series: int = 0
    labels: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    unmatched: Counter[str] = field(default_factory=Counter)  # names of segments that are no class; shown locally
    review: Counter[str] = field(default_factory=Counter)  # cases that a person should look at, by reason
