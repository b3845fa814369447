"""How updates with client-level noise are encoded for their sum: nothing of the noise is cut or rounded away.

What is cut or rounded at each site is not a function of the sum, whose noise is what the accountant counts. So the
encoding leaves room for every site's own share of it, on a grid much finer than that share; both follow from the study.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from medfl.shared.errors import ConfigError, ProtocolError
from medfl.shared.privacy.adaptive_clip import clip_of
from medfl.shared.privacy.settings import ClientLevel
from medfl.shared.secagg.encoding import Encoding
from medfl.shared.secagg.limits import LARGEST_COHORT, SMALLEST_COHORT
from medfl.shared.secagg.reasons import Reason
from medfl.shared.secagg.rings import Ring

ROOM = 8.0
"""Largest shares of noise that are not cut: a normal value is farther out once in 10^15 times."""

FINEST = 0.01
"""Largest step of the grid, in the smallest share of noise."""


def share_of_noise(noise_multiplier: float, clip_norm: float, survivors: int) -> float:
    """Standard deviation of one site's noise, so that ``survivors`` of them have ``noise_multiplier`` x ``clip_norm``.

    ``survivors`` is the least number of sites whose sum can be opened. More of them have more noise, never less.

    >>> share_of_noise(6.0, 0.5, survivors=9)
    1.0
    """
    if survivors < 1 or not (math.isfinite(noise_multiplier) and noise_multiplier > 0 and clip_norm > 0):
        raise ConfigError("client-level noise needs a positive noise_multiplier and clip_norm: set them under privacy:")
    return noise_multiplier * clip_norm / math.sqrt(survivors)


def clip_of_round(names: Iterable[str], settings: ClientLevel) -> float:
    """The l2 clip of a round whose encoding has the numbers ``names``. ProtocolError: it should name one."""
    return settings.clip_norm if settings.adaptive_clip is None else clip_of(names, settings)


def clip_with_noise(clip: float, settings: ClientLevel) -> float:
    """The encoding's clip: what an update within the l2 clip ``clip`` has in one value, with any site's share of noise.

    Sites count on different numbers of survivors, and never on fewer than every secure sum needs.
    """
    return clip + ROOM * share_of_noise(settings.noise_multiplier, clip, SMALLEST_COHORT)


def is_fine(ring: Ring, widest: float, clip: float, settings: ClientLevel, *, reference: int) -> bool:
    """Whether an encoding with the clip ``widest`` has a grid fine enough for the noise of a round with ``clip``."""
    step = widest * reference / ring.scale
    return step <= FINEST * share_of_noise(settings.noise_multiplier, clip, LARGEST_COHORT)


def suits(ring: Ring, settings: ClientLevel) -> bool:
    """Whether ``ring`` is fine enough for a consortium as large as one secure sum."""
    clip = settings.clip_norm
    return is_fine(ring, clip_with_noise(clip, settings), clip, settings, reference=LARGEST_COHORT)


def check_room_for_noise(encoding: Encoding, settings: ClientLevel) -> None:
    """Return when ``encoding`` leaves a site's noise as it is.

    Raises:
        ProtocolError: it would cut or round the noise away, or names no clip where the study's clip is adaptive.
    """
    clip = clip_of_round(encoding.scalars, settings)
    least = clip_with_noise(clip, settings)
    for segment in encoding.segments:
        if segment.clip < least:
            raise ProtocolError(
                f"the coordinator would cut updates at {segment.clip:g}, and with their noise they need {least:g}: "
                "cut at each site, the noise would be missing in the sum. Both must run releases that agree on it",
                reason=Reason.OTHER_ENCODING,
            )
        if not is_fine(encoding.ring, segment.clip, clip, settings, reference=encoding.reference):
            raise ProtocolError(
                f"the coordinator would round updates so coarsely (a clip of {segment.clip:g}, {encoding.reference} "
                f"sites, {encoding.ring} bits) that part of the noise would be missing in the sum. Both must run "
                "releases that agree on it; in a large consortium the study needs secure_aggregation.ring_bits: 32",
                reason=Reason.OTHER_ENCODING,
            )
