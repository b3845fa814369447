"""Where a simulation's results go, so that no other simulation of the same study overwrites them."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from medfl.shared.files import write_whole
from medfl.simulations.config import SimulationSettings

log = logging.getLogger("medfl.simulations")

_WHOSE = "simulation.sha256"


def circumstances(settings: SimulationSettings) -> str:
    """Digest of all beside the study that can change its numbers, except the images themselves."""
    parts = [settings.failures.model_dump_json(), settings.partition.model_dump_json() if settings.partition else ""]
    parts += [site.model_dump_json() for site in settings.sites]
    parts += [settings.curious_server.model_dump_json()] if settings.curious_server else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def folder_of(settings: SimulationSettings) -> Path:
    """Where results go: the study's folder, or one beside it where those of other sites or failures are there."""
    usual, mine = settings.output / f"{settings.study.name}-{settings.study.digest[:8]}", circumstances(settings)
    beside = usual.with_name(f"{usual.name}-{mine[:8]}")
    whose = usual / _WHOSE
    if not beside.exists() and (not whose.exists() or whose.read_text() == mine):
        return usual
    log.info("%s holds another simulation of this study: results go to %s", usual.name, beside.name)
    return beside


def claim(folder: Path, settings: SimulationSettings) -> None:
    """``folder`` holds results of ``settings`` from now on."""
    write_whole(folder / _WHOSE, circumstances(settings).encode(), mode=0o644)
