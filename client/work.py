"""The training in progress, so that it can be ended from another thread."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Work:
    """One training of one study. Who sets ``given_up``, from any thread, ends it at its next batch."""

    study: str  # digest
    given_up: bool = False
