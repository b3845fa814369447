"""Every error MedFL raises on purpose: what it says to a person, its code on the wire, its exit status."""

from __future__ import annotations

from enum import StrEnum


class Code(StrEnum):
    """What the other side learns of an error: a code, never the text (which may name local things)."""

    UNEXPECTED = "unexpected"
    CONFIGURATION = "configuration"
    REFUSED = "refused"
    DATA = "data"
    NETWORK = "network"
    PROTOCOL = "protocol"
    TRAINING = "training"


OUTSIDE_HOURS = "outside hours"
"""Reason of a refusal that passes by itself: the coordinator offers its study again later."""

GPU_IN_USE = "GPU in use"
"""Another one: something else runs on the site's training device."""

BUDGET = "budget"
"""Reason of a refusal that does not pass: what a study costs would exceed what the site allows."""


class MedFLError(Exception):
    """Base of all deliberate errors. ``str(error)`` is one line for the person at this machine.

    ``reason`` is a short fixed word group without any value in it: the only words the other side may see.
    """

    code: Code = Code.UNEXPECTED
    exit_status: int = 1

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class ConfigError(MedFLError):
    """A configuration file, study or command line is wrong. One line per problem."""

    code = Code.CONFIGURATION
    exit_status = 2


class PolicyRefusal(MedFLError):
    """The site's own rules forbid what was asked."""

    code = Code.REFUSED
    exit_status = 3


class DiskRefusal(PolicyRefusal):
    """What has to be on the disk before anything may happen cannot be written. It passes when there is space again.

    To the other side a refusal as any other; its exit status is that of what a service manager tries again.
    """

    exit_status = 1


class DataError(MedFLError):
    """Images, labels or splits cannot be used as they are. Never carries a patient or a file name."""

    code = Code.DATA
    exit_status = 4


class NetworkError(MedFLError):
    """The other side cannot be reached or does not accept who we are."""

    code = Code.NETWORK
    exit_status = 5


class ProtocolError(MedFLError):
    """A message is malformed, unknown, replayed or does not fit the state of the exchange."""

    code = Code.PROTOCOL


class TrainingError(MedFLError):
    """Training cannot go on: a loss is not finite, the network cannot be built, memory ran out."""

    code = Code.TRAINING
