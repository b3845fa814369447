"""The training in progress, so that it can be ended from another thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Event


@dataclass(frozen=True, slots=True)
class Work:
    """One training of one study. Who sets ``given_up`` ends it at its next batch."""

    study: str  # digest
    given_up: Event = field(default_factory=Event)
