"""The clips of a secure study's updates, as they follow what each sum says of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from medfl.server.secagg.outcome import SecureSum
from medfl.shared.algorithms.needs import Beside
from medfl.shared.files import write_whole
from medfl.shared.privacy.noised_encoding import clip_of_round, clip_with_noise
from medfl.shared.privacy.settings import ClientLevel
from medfl.shared.secagg.clipping import CLIPPED_TOO_OFTEN, clip_by_class, clip_by_tensor, merge, widened
from medfl.shared.secagg.encoding import Segment
from medfl.shared.secagg.rings import Ring
from medfl.shared.study import Study
from medfl.shared.weights import Layout

log = logging.getLogger("medfl.server")


class Clips:
    """The next round's clips; in ``memory``, a file, they outlive the process.

    A sum that is finished after a restart says with which clips it was made, so following it twice changes nothing.
    Under client-level privacy there is nothing to follow: the noise says how much room it needs.
    """

    def __init__(self, study: Study, layout: Layout, memory: Path | None) -> None:
        self._settings, self._layout, self._memory = study.secure_aggregation, layout, memory
        self._noise = study.privacy if isinstance(study.privacy, ClientLevel) else None
        self._first = _first(study, layout)
        self.segments = self._remembered()

    def of(self, names: Sequence[str]) -> tuple[Segment, ...]:
        """The clips of a round whose encoding has the numbers ``names``; one may name client-level privacy's clip."""
        if self._noise is None:
            return self.segments
        clip = clip_with_noise(clip_of_round(names, self._noise), self._noise)
        return (Segment(self._layout.length, clip),)

    def follow(self, total: SecureSum, used: Sequence[Segment]) -> None:
        """Choose the next round's clips after a sum of updates that were cut at those that were ``used``."""
        if self._noise is not None:
            return
        settings, values = self._settings, len(total.survivors) * total.mean.size
        if Ring(settings.ring_bits) is Ring.BITS_16 and self._layout.length == total.mean.size:
            # narrow rings need each tensor's own clip
            weights, statistics = settings.clip, settings.statistics_clip
            self._use(clip_by_tensor(self._layout, total.mean, weights=weights, statistics=statistics))
        elif not 0 <= total.clipped <= values:
            log.warning(
                "of %d values %.6g are said to have been clipped, which cannot be: the clip stays",
                values,
                total.clipped,
            )
        elif total.clipped > CLIPPED_TOO_OFTEN * values:
            wider, share = widened(used, self._first), 100 * total.clipped / values
            if wider == tuple(used):
                log.warning(
                    "%.2g %% of the values were clipped, and the clip is as large as it gets: raise "
                    "secure_aggregation.clip in the next study",
                    share,
                )
            else:
                log.warning("%.2g %% of the values were clipped: the clip is doubled", share)
            self._use(wider)

    def _use(self, segments: tuple[Segment, ...]) -> None:
        if segments == self.segments:
            return
        self.segments = segments
        if self._memory is not None:
            content = [[segment.length, segment.clip] for segment in segments]
            write_whole(self._memory, json.dumps(content).encode())

    def _remembered(self) -> tuple[Segment, ...]:
        if self._memory is not None:
            try:
                return self._read(self._memory.read_bytes())
            except FileNotFoundError:
                pass
            except (OSError, ValueError, TypeError):
                log.warning("%s cannot be read: the clips begin anew", self._memory)
        return self._first

    def _read(self, content: bytes) -> tuple[Segment, ...]:
        found = tuple(Segment(int(length), float(clip)) for length, clip in json.loads(content))
        fits = sum(segment.length for segment in found) == sum(segment.length for segment in self._first)
        if not fits or not all(segment.length > 0 and segment.clip > 0 and isfinite(segment.clip) for segment in found):
            raise ValueError("they are not this study's")
        return found


def _first(study: Study, layout: Layout) -> tuple[Segment, ...]:
    """Clips of the model, and after it of what the study's strategy sends beside it."""
    settings, beside = study.secure_aggregation, study.demands.beside
    model = clip_by_class(layout, weights=settings.clip, statistics=settings.statistics_clip)
    match beside:
        case Beside.NOTHING:
            return model
        case Beside.ONE_VALUE:
            return merge([*model, Segment(1, settings.statistics_clip)])
        case Beside.A_MODEL:
            return merge([*model, *model])
