"""What a site has for a study, as counts that its administrator can check. Stays at the site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from medfl.client.data.splits import Split


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

    def lines(self) -> list[str]:
        """The report as lines of text, for a terminal."""
        usable = ", ".join(f"{split.value} {count}" for split, count in self.cases.items())
        rows = ", ".join(f"{split.value} {count}" for split, count in self.examples.items())
        out = [
            f"patients {self.patients}, studies {self.studies}, series {self.series}, labels {self.labels}",
            f"usable cases: {usable}",
            f"examples: {rows}",
            "left out: " + (", ".join(f"{why} {n}" for why, n in sorted(self.quarantined.items())) or "nothing"),
            "classes: " + ", ".join(f"{name} {share:.1%}" for name, share in self.class_balance.items()),
        ]
        if self.unmatched:
            names = ", ".join(f"{name!r} {n}" for name, n in sorted(self.unmatched.items()))
            out.append(f"segments that are no class (see data.aliases): {names}")
        if self.review:
            out.append("to look at: " + ", ".join(f"{why} {n}" for why, n in sorted(self.review.items())))
        if self.spacing_mm:
            out.append("spacing in mm: " + " x ".join(f"{r.low:.2f}..{r.high:.2f}" for r in self.spacing_mm))
        if self.intensity:
            out.append(f"raw values: {self.intensity.low:g}..{self.intensity.high:g}")
        for attribute, counts in self.subgroups.items():
            out.append(f"{attribute}: " + ", ".join(f"{value} {n}" for value, n in sorted(counts.items())))
        if self.held:
            out.append(f"held: {self.held}")
        out.append(f"seconds: {self.seconds:.1f}")
        return out
