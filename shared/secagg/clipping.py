"""Which clip each tensor gets: one per class of tensors (32 bits), or one per tensor after the last aggregate (16)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import numpy as np

from medfl.shared.secagg.encoding import Segment
from medfl.shared.weights import Flat, Layout

_STATISTICS = ("running_mean", "running_var")
_HEADROOM = 4.0  # a single site's update may be so many times larger than the mean of all
_FLOOR = 1e-3  # of the largest clip: a tensor that stood still may move again
CLIPPED_TOO_OFTEN = 1e-4
"""Share of clipped values above which the next round needs a larger clip."""

LARGEST = 256.0
"""No clip becomes more than so many times the study's own: whoever says that values were clipped cannot be named."""


def clip_by_class(layout: Layout, *, weights: float, statistics: float) -> tuple[Segment, ...]:
    """Segments of ``layout`` with one clip for weights and one for running statistics of normalisation layers."""
    return merge(Segment(prod(shape), statistics if _is_statistic(name) else weights) for name, shape in layout.tensors)


def clip_by_tensor(layout: Layout, aggregate: Flat, *, weights: float, statistics: float) -> tuple[Segment, ...]:
    """Segments of ``layout`` with clips at 4 times each tensor's largest value in the last public ``aggregate``.

    No clip falls below a thousandth of the largest one, and none is above 256 times the study's, ``weights`` for
    weights and ``statistics`` for running statistics.
    """
    largest, start = [], 0
    sizes = [prod(shape) for _, shape in layout.tensors]
    for size in sizes:
        largest.append(float(np.abs(aggregate[start : start + size]).max(initial=0.0)))
        start += size
    ceiling = max(largest, default=0.0) or 1.0
    limits = [LARGEST * (statistics if _is_statistic(name) else weights) for name, _ in layout.tensors]
    return merge(
        Segment(size, min(limit, _HEADROOM * max(value, _FLOOR * ceiling)))
        for size, value, limit in zip(sizes, largest, limits, strict=True)
    )


def widened(segments: Sequence[Segment], first: Sequence[Segment]) -> tuple[Segment, ...]:
    """``segments`` with doubled clips, none above 256 times that of the ``first`` round."""
    return tuple(
        Segment(now.length, min(2 * now.clip, LARGEST * then.clip)) for now, then in zip(segments, first, strict=True)
    )


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in _STATISTICS


def merge(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """The same clips in fewer segments: empty ones dropped, neighbours of equal clip joined."""
    merged: list[Segment] = []
    for segment in segments:
        if segment.length and merged and merged[-1].clip == segment.clip:
            merged[-1] = Segment(merged[-1].length + segment.length, segment.clip)
        elif segment.length:
            merged.append(segment)
    return tuple(merged)
