"""The clip of client-level privacy that follows the updates, as the coordinator moves it after each secure sum."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from medfl.shared.errors import MedFLError
from medfl.shared.files import write_whole
from medfl.shared.privacy.adaptive_clip import clip_of, next_clip, number_within
from medfl.shared.privacy.settings import AdaptiveClip, ClientLevel

log = logging.getLogger("medfl.server")


class Clip:
    """The next round's clip; in ``memory``, a file, it outlives the process.

    A sum that is finished after a restart names the clip that it was trained with, so moving it twice changes nothing.
    """

    def __init__(self, settings: ClientLevel, adaptive: AdaptiveClip, memory: Path | None) -> None:
        self._settings, self._adaptive, self._memory = settings, adaptive, memory
        self._clip = self._remembered()

    @property
    def names(self) -> tuple[str, ...]:
        """The one number that travels beside an update, masked."""
        return (number_within(self._clip),)

    def follow(self, halves: Mapping[str, float], *, sites: int) -> None:
        """Move the clip by what a sum over ``sites`` says. Raises ProtocolError when it says something else."""
        used = clip_of(halves, self._settings)
        (total,) = halves.values()
        self._clip = next_clip(used, halves=total, sites=sites, settings=self._settings, adaptive=self._adaptive)
        log.info(
            "about %.0f %% of the updates were within the clip %.4g; the next one is %.4g",
            100 * min(max(total / sites + 0.5, 0.0), 1.0),
            used,
            self._clip,
        )
        if self._memory is not None:
            write_whole(self._memory, json.dumps(self.names).encode())

    def _remembered(self) -> float:
        if self._memory is not None:
            try:
                return clip_of(json.loads(self._memory.read_bytes()), self._settings)
            except FileNotFoundError:
                pass
            except (OSError, ValueError, TypeError, AttributeError, MedFLError):
                log.warning("%s cannot be read: the clip begins anew at privacy.clip_norm", self._memory)
        return self._settings.clip_norm
