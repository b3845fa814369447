"""What things are called at a site, and which classes of the study that means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medfl.client.data.case import Quarantine
from medfl.shared.data_spec import DataSpec, plain

UNLABELLED = -1
"""In place of a class: a value of a mask that says that nobody has looked there."""

_NUMBER = re.compile(r"-?[0-9]+")
_FULL = frozenset({255, 65535})  # what paints white where there are two classes
_NOT_LOOKED_AT = "ignore"  # nnU-Net's name of that label


def as_text(name: str) -> str:
    """``name``, part of a file's name, if an opt-out list could name it too: lists are UTF-8, files may be otherwise.

    Raises:
        Quarantine: it is not UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Quarantine("patient whose name here is not UTF-8") from None
    return name


class Contradiction(ValueError):
    """A list of labels cannot mean what it says; ``str`` says why."""


def aliased(name: str, aliases: Mapping[str, str]) -> str:
    """The study's name of what is called ``name`` here; ``name`` itself where nobody has said (see :func:`plain`)."""
    wanted = plain(name)
    return next((there for here, there in aliases.items() if plain(here) == wanted), name)


def class_named(name: str, spec: DataSpec, aliases: Mapping[str, str]) -> int | None:
    """Index of the class that ``name`` is, or None when the study does not use it."""
    return spec.class_of(aliased(name, aliases))


def class_of_number(number: int, spec: DataSpec, aliases: Mapping[str, str]) -> int | None:
    """Index of the class that ``number`` is: what it is called, or else its place in the study's list.

    The place does not count where the study or the site names other numbers, or the class there is itself a number.
    """
    if (named := class_named(str(number), spec, aliases)) is not None:
        return named
    if not 0 <= number < len(spec.classes) or _NUMBER.fullmatch(plain(spec.classes[number])):
        return None
    others = any(_NUMBER.fullmatch(plain(name)) for name in (*spec.label_map, *aliases))
    return None if others and number else number


@dataclass(frozen=True, slots=True)
class Meaning:
    """What the values of masks mean."""

    spec: DataSpec
    aliases: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[int, int] | None = None  # value -> class, where something beside the masks says so
    white: bool = False  # whether 255 may be the class of a study that has one beside the background

    def classes(self, mask: NDArray[np.generic]) -> NDArray[np.uint8]:
        """Class of every element of ``mask``.

        Raises:
            Quarantine: a value is not whole, is no class, or says that nobody has looked there.
        """
        found = np.unique(mask)
        if not np.isfinite(found).all() or (found != np.round(found)).any():
            raise Quarantine("mask with values that are not whole")
        out = np.zeros(mask.shape, np.uint8)
        for value in found.tolist():
            index = self._of(int(value))
            if index is None:
                raise Quarantine("mask value that is no class of the study")
            if index == UNLABELLED:
                raise Quarantine("mask with parts that nobody has labelled")
            out[mask == value] = index
        return out

    def _of(self, value: int) -> int | None:
        if self.values is not None:
            return self.values.get(value)
        index = class_of_number(value, self.spec, self.aliases)
        if index is None and self.white and value in _FULL and len(self.spec.classes) == 2:
            return class_of_number(1, self.spec, self.aliases)
        return index


def meaning_of_values(
    labels: Mapping[str, object], spec: DataSpec, aliases: Mapping[str, str], unmatched: Counter[str]
) -> dict[int, int]:
    """Class of each value of a mask, from the value of each name; what the study does not use is background.

    Raises:
        Contradiction: a value is no whole number, is given twice, or is 0 for a finding.
    """
    values: dict[int, int] = {}
    for name, value in labels.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise Contradiction(f"label {name!r} has no whole number")
        if value in values:
            raise Contradiction(f"two labels have number {value}")
        index = class_named(name, spec, aliases)
        if value == 0 and index:
            raise Contradiction(f"label {name!r} has number 0, which is the background")
        if index is None and value and plain(name) == _NOT_LOOKED_AT:
            index = UNLABELLED
        elif index is None and value:
            unmatched[name] += 1
        values[value] = index or 0
    return {0: 0, **values}


def without_value(values: Mapping[int, int], spec: DataSpec) -> list[str]:
    """Classes of the study that no value of a mask means: nobody has marked them, and yet they may be there."""
    return [name for index, name in enumerate(spec.classes) if index and index not in values.values()]
