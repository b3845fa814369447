"""A clip that follows the updates (Andrew et al. 2021, https://arxiv.org/abs/1905.03871, Algorithm 1), for both sides.

Each site says in a noised half whether its update was within the clip, and the clip moves until the wanted share of
the updates is. The clip of a round stands in the name of that number, so it is part of the encoding, and of what every
site signs: no coordinator can tell two sites two clips, and leave one of them alone with its noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from medfl.shared.errors import ProtocolError
from medfl.shared.privacy.settings import AdaptiveClip, ClientLevel

FARTHEST = 1000.0
"""The clip stays within so many times the study's ``clip_norm``, above and below."""

_NAME = "within clip "


def count_noise(settings: ClientLevel, adaptive: AdaptiveClip) -> float:
    """Standard deviation of the noise on the number of sites within the clip."""
    return 2 * settings.noise_multiplier if adaptive.count_noise is None else adaptive.count_noise


def noise_for_both(settings: ClientLevel) -> float:
    """Noise multiplier of the one Gaussian mechanism that costs what a round's update and count cost together.

    A site moves the sum of the updates by one clip norm, and the count, whose parts are -1/2 and 1/2, by 1/2. Two
    Gaussian releases are one of the root of the sum of their squared signal-to-noise ratios (the paper's Theorem 1).
    """
    if settings.adaptive_clip is None:
        return settings.noise_multiplier
    count = 2 * count_noise(settings, settings.adaptive_clip)
    return 1 / math.hypot(1 / settings.noise_multiplier, 1 / count)


def next_clip(clip: float, *, halves: float, sites: int, settings: ClientLevel, adaptive: AdaptiveClip) -> float:
    """The clip of the round after one of ``clip`` in which the noised halves of ``sites`` add up to ``halves``.

    It shrinks by ``exp(learning_rate * (share within - quantile))``; a share outside 0 to 1 is noise, and cut.
    """
    within = min(max(halves / sites + 0.5, 0.0), 1.0)
    moved = clip * math.exp(-adaptive.learning_rate * (within - adaptive.quantile))
    return min(max(moved, settings.clip_norm / FARTHEST), settings.clip_norm * FARTHEST)


def number_within(clip: float) -> str:
    """Name of the number that says whether an update was within ``clip``.

    >>> number_within(0.25)
    'within clip 0.25'
    """
    return f"{_NAME}{clip!r}"


def clip_of(names: Iterable[str], settings: ClientLevel) -> float:
    """The clip in the one name of ``names``.

    Raises:
        ProtocolError: there is another number than that of a clip, or the clip is too far from the study's.
    """
    (name, *others) = (*names, "")
    try:
        clip = float(name.removeprefix(_NAME))
    except ValueError:
        clip = math.nan
    # Compared as text as well: one clip has one name, and so one encoding.
    known = others == [""] and name == number_within(clip)
    if not known or not settings.clip_norm / FARTHEST <= clip <= settings.clip_norm * FARTHEST:
        raise ProtocolError(
            "the coordinator names no clip for this round, or one far from the study's: both must run releases that "
            "agree on adaptive clipping",
            reason="no clip",
        )
    return clip
