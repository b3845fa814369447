"""What a site has for a study, as counts that its administrator can check. Stays at the site."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from medfl.client.data.splits import Split

_WIDTH, _HEAD, _NUMBER = 80, 16, 8  # columns of text: of a line, of what is counted, of a count


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest and largest of something measured."""

    low: float
    high: float

    def including(self, value: float) -> Range:
        """The range that also holds ``value``."""
        return Range(min(self.low, value), max(self.high, value))


@dataclass(frozen=True, slots=True)
class DataReport:
    """Counts of one loading. ``class_balance`` is the share of labelled pixels, or of images, that are each class."""

    patients: int
    studies: int
    series: int
    labels: int
    cases: Mapping[Split, int]
    examples: Mapping[Split, int]  # rows of the tensors: slices, pictures or volumes
    quarantined: Mapping[str, int]  # reason -> how many
    unmatched: Mapping[str, int]  # name of a segment here that is no class of the study -> how many
    review: Mapping[str, int]  # cases that a person should look at, by reason
    class_balance: Mapping[str, float]
    spacing_mm: tuple[Range, ...]  # along slice, row, column, before resampling; empty where unknown
    intensity: Range | None  # raw values
    subgroups: Mapping[str, Mapping[str, int]]  # attribute -> value -> patients
    seconds: float
    held: str = ""  # where the tensors lie, for a person
    opt_outs: int = 0  # entries of the opt-out list
    unknown_opt_outs: int = 0  # of these: name no patient here

    def lines(self) -> list[str]:
        """The report as a table of two columns, at most 80 wide: what, and how much of it."""
        out: list[str] = []
        for what, values in self._rows():
            for number, value in enumerate(values):
                head = what if number == 0 else ""
                out += textwrap.wrap(
                    value,
                    _WIDTH,
                    initial_indent=f"{head:<{_HEAD}}",
                    subsequent_indent=" " * (_HEAD + _NUMBER),
                    break_long_words=False,
                    drop_whitespace=False,
                )
        return [line.rstrip() for line in out]

    def _rows(self) -> list[tuple[str, list[str]]]:
        out = [
            ("patients", [str(self.patients)]),
            ("studies", [str(self.studies)]),
            ("series", [str(self.series)]),
            ("labels", [str(self.labels)]),
            ("usable cases", [", ".join(f"{split.value} {count}" for split, count in self.cases.items())]),
            ("examples", [", ".join(f"{split.value} {count}" for split, count in self.examples.items())]),
            ("left out", _counted(self.quarantined) or ["nothing"]),
            ("to look at", _counted(self.review) or ["nothing"]),
            ("opt-out list", _looked_up(self.opt_outs, self.unknown_opt_outs)),
            ("other segments", _counted({repr(name): count for name, count in self.unmatched.items()})),
            ("classes", [f"{share:6.1%}  {name}" for name, share in self.class_balance.items()]),
            ("spacing in mm", [" x ".join(f"{r.low:.2f}..{r.high:.2f}" for r in self.spacing_mm) or "unknown"]),
        ]
        if self.intensity:
            out.append(("raw values", [f"{self.intensity.low:g}..{self.intensity.high:g}"]))
        for attribute, counts in self.subgroups.items():
            out.append((attribute, [f"{count:6d}  {value}" for value, count in sorted(counts.items())]))
        return [*out, ("held", [self.held or "nothing"]), ("seconds", [f"{self.seconds:.1f}"])]


def _looked_up(entries: int, unknown: int) -> list[str]:
    return [f"{unknown:6d}  of {entries} entries match no patient here"] if entries else []


def _counted(reasons: Mapping[str, int]) -> list[str]:
    """The most frequent first."""
    return [f"{count:6d}  {why}" for why, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))]
