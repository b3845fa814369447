"""The seam between the protocol and whatever carries it: requests by site, replies as they arrive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medfl.shared.errors import Code, MedFLError


class Phase(StrEnum):
    """The five exchanges of a secure sum, in their order."""

    ADVERTISE_KEYS = "advertise_keys"
    SHARE_KEYS = "share_keys"
    MASKED_INPUT = "masked_input"
    CONFIRM_SURVIVORS = "confirm_survivors"
    UNMASK = "unmask"


@dataclass(frozen=True, slots=True)
class PhaseRequest:
    """Coordinator to site: a few kilobytes."""

    control: bytes


@dataclass(frozen=True, slots=True)
class PhaseReply:
    """Site to coordinator. Only the masked input has arrays.

    ``vector`` is uint32, uint16 or packed uint8, one axis; ``scalars`` is uint64.
    """

    control: bytes
    vector: NDArray[Any] | None = None
    scalars: NDArray[np.uint64] | None = None


@dataclass(frozen=True, slots=True)
class SiteRefusal:
    """A site's answer that it does not go on, in the two fixed words that may cross."""

    code: Code
    reason: str = ""

    @classmethod
    def of(cls, error: MedFLError) -> SiteRefusal:
        """What the coordinator may know of ``error``."""
        return cls(error.code, error.reason)

    def __str__(self) -> str:
        """As a log shows it."""
        return f"{self.code.value}: {self.reason}" if self.reason else self.code.value


class Exchange(Protocol):
    """Carries one phase to several sites.

    Yields each site's answer at most once, in order of arrival, under the id of the site that is authenticated as its
    sender, and ends at the phase's deadline or when all have answered. What arrives later is never yielded. The
    consumer may stop early; a site that does not answer yields nothing.
    """

    def __call__(
        self, phase: Phase, requests: Mapping[int, PhaseRequest], /
    ) -> Iterator[tuple[int, PhaseReply | SiteRefusal]]:
        """Send ``requests`` (by site id) and yield the answers."""
        ...
