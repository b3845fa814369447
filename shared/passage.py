"""What an audit log tells of a message: kind, study, round, size, digest, form of the results; never what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

FAILED = "failed"
"""Outcome of a message that says that something failed or was refused."""


class Form(StrEnum):
    """How results stand in a message."""

    MASKED = "masked"  # only the sum over all sites becomes known
    CLEAR = "clear"
    NOTHING = "no result"  # keys, shares, acknowledgements, refusals


@dataclass(frozen=True, slots=True)
class Content:
    """Size and digest of what a message holds, without headers of the transport."""

    bytes: int
    sha256: str  # Flower's object id: the very name under which the content crosses and the coordinator keeps it


@dataclass(frozen=True, slots=True)
class Passage:
    """What a message is about."""

    kind: str  # of medfl.shared.messages.Kind, or "unknown"
    study: str = ""  # digest; empty where the message belongs to none that is known here
    round: int | None = None
    phase: str = ""  # of a secure sum
    name: str = ""  # the study's, in an offer

    def fields(self) -> Mapping[str, str | int | None]:
        """As a row has them."""
        return {"kind": self.kind, "study": self.study, "round": self.round, "phase": self.phase, "name": self.name}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a site says: an outcome of medfl.shared.messages, or ``failed`` with code and fixed words."""

    outcome: str
    code: str = ""
    reason: str = ""
