"""What goes into a secure sum at the coordinator, and what can come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from medfl.shared.errors import ProtocolError
from medfl.shared.secagg.announcement import Purpose
from medfl.shared.secagg.encoding import Encoding
from medfl.shared.secagg.exchange import SiteRefusal
from medfl.shared.secagg.hashing import DIGEST_BYTES
from medfl.shared.weights import Flat


@dataclass(frozen=True, slots=True)
class SumPlan:
    """What is to be summed, over whom. ``model`` is the digest of the weights that the updates start from."""

    study: bytes  # digest
    purpose: Purpose
    cohort: tuple[int, ...]  # ids of the sites that hold a contribution
    encoding: Encoding
    model: bytes
    training: int = 0  # round of the study that they were asked for
    sent: bytes = bytes(DIGEST_BYTES)  # digest of the whole vector that they were sent


@dataclass(frozen=True, slots=True)
class SecureSum:
    """The only thing the coordinator learns. ``mean`` is weighted by the sites' weights, whose sum is ``weight``."""

    mean: Flat
    weight: float
    scalars: Mapping[str, float]  # sums over the survivors
    clipped: float  # values that were clipped, of all survivors together
    survivors: tuple[int, ...]
    attempts: int
    refusals: Mapping[int, SiteRefusal]  # why each other site is not in the sum, or did not help to finish


class SumVoid(ProtocolError):
    """No sum came about. ``confirmed``: the survivors were fixed, so only the very same sum may still be had.

    ``survivors`` are those sites then; ``refusals`` says what each missing site answered; ``culprits`` dealt shares
    that do not open.
    """

    def __init__(
        self,
        message: str,
        *,
        confirmed: bool,
        survivors: tuple[int, ...] = (),
        refusals: Mapping[int, SiteRefusal] | None = None,
        culprits: tuple[int, ...] = (),
    ) -> None:
        super().__init__(message, reason="sum void")
        self.confirmed = confirmed
        self.survivors = survivors
        self.refusals = dict(refusals or {})
        self.culprits = culprits
