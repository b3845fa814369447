"""What the scores say: means, confidence intervals over seeds, paired tests between methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and the half-width of its 95 % confidence interval (NaN from fewer than three values)."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "no score"
        return f"{self.mean:.3f}" if math.isnan(self.half_width) else f"{self.mean:.3f} ± {self.half_width:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """Student's interval of the mean of ``values``; two values would give one of 9 times their distance, which says
    nothing. Of no value, or where one is NaN, the mean is NaN.

    >>> interval([0.6, 0.7, 0.8])  # half-width 4.303 * 0.1 / sqrt(3)
    Interval(mean=0.7, half_width=0.2484)
    """
    from scipy.stats import t

    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 3 or math.isnan(mean):
        return Interval(mean, math.nan)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(round(mean, 12), round(half, 4))


@dataclass(frozen=True, slots=True)
class Paired:
    """One method against another over the same sites and seeds."""

    difference: float  # mean of (method - reference)
    pairs: int
    p: float  # two-sided Wilcoxon signed-rank test; NaN from fewer than 6 pairs, where it cannot fall below 0.05
    better: int  # sites at which the method's mean is at least as good
    sites: int  # that are compared


Scores = Mapping[tuple[str, int], float]
"""Score by (site, seed)."""


def paired(method: Scores, reference: Scores) -> Paired:
    """Compare over what both have. Sites of one seed share a model, so that p is a hint and no proof."""
    from scipy.stats import wilcoxon

    keys = sorted(key for key in method if key in reference and not math.isnan(method[key] + reference[key]))
    if not keys:
        return Paired(math.nan, 0, math.nan, 0, 0)
    differences = [method[key] - reference[key] for key in keys]
    p = math.nan
    if len(keys) >= 6 and any(differences):
        p = float(wilcoxon(differences).pvalue)
    by_site: dict[str, list[float]] = {}
    for (site, _), difference in zip(keys, differences, strict=True):
        by_site.setdefault(site, []).append(difference)
    better = sum(statistics.fmean(d) >= 0 for d in by_site.values())
    return Paired(statistics.fmean(differences), len(keys), p, better, len(by_site))
