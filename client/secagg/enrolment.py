"""Who this site is in the consortium, and its own rules for secure sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfl.shared.errors import ConfigError, ProtocolError
from medfl.shared.secagg.limits import SMALLEST_COHORT
from medfl.shared.secagg.reasons import Reason
from medfl.shared.secagg.roster import Roster


@dataclass(frozen=True, slots=True)
class Rules:
    """What this site demands beyond what the consortium does. No message can lower it."""

    minimum_cohort: int = SMALLEST_COHORT
    allow_shrunk_repeat: bool = False  # a void sum repeated with fewer sites, after retraining


@dataclass(frozen=True, slots=True)
class Enrolment:
    """The site's id, its private site key, the roster its administrator confirmed, and its rules."""

    site: int
    key: Ed25519PrivateKey
    roster: Roster
    rules: Rules = Rules()

    def __post_init__(self) -> None:
        """Raise ConfigError unless the roster knows this site under this key."""
        member = self.roster.by_id.get(self.site)
        if member is None or member.key != self.key.public_key().public_bytes_raw():
            raise ConfigError(
                f"the roster of {self.roster.consortium} (epoch {self.roster.epoch}) does not have this site's key "
                f"under id {self.site}: ask the coordinator for the current roster, or give the key it was made with"
            )

    @property
    def minimum_cohort(self) -> int:
        """Fewer sites than this are never summed with this one."""
        return max(SMALLEST_COHORT, self.roster.minimum_cohort, self.rules.minimum_cohort)

    def under(self, digest: bytes, *, finishing: bool = False) -> Enrolment:
        """Itself, for its own roster: a consortium that never changes, as a simulated one."""
        if digest != self.roster.digest:
            raise other_roster(f"epoch {self.roster.epoch}")
        return self


class Enrolments(Protocol):
    """The site's enrolment under each roster that it accepts now."""

    @property
    def minimum_cohort(self) -> int:
        """Fewer sites than this are never summed with this one, under any of them."""
        ...

    def under(self, digest: bytes, *, finishing: bool = False) -> Enrolment:
        """The enrolment under the roster that ``digest`` names.

        ``finishing``: a sum whose survivors are being fixed is finished also under a roster that was accepted when it
        began: to break it off would leave some sites with an update that counts as summed.

        Raises:
            ProtocolError, PolicyRefusal: the roster is unknown here, superseded, or not confirmed.
        """
        ...


def other_roster(here: str) -> ProtocolError:
    """The coordinator names a roster that is not one of those accepted here."""
    return ProtocolError(
        f"the coordinator uses another roster than {here} accepted here: see medfl-client ... roster confirm",
        reason=Reason.BAD_ROSTER,
    )
