"""A site's place in every roster that is accepted at this moment: rosters change while the node runs."""

from __future__ import annotations

from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfl.client.secagg.enrolment import Enrolment, Rules
from medfl.shared.consortium import Membership
from medfl.shared.secagg.limits import SMALLEST_COHORT
from medfl.shared.secagg.roster import Roster


class Rosters(Protocol):
    """Where the rosters come from; see :class:`medfl.client.rosters.SiteRosters`."""

    def in_force(self) -> Membership | None:
        """The latest roster that this site sums under."""
        ...

    def with_digest(self, digest: bytes, *, finishing: bool = False) -> Roster:
        """The roster that ``digest`` names, or ProtocolError, PolicyRefusal."""
        ...


class LiveEnrolments:
    """See :class:`medfl.client.secagg.enrolment.Enrolments`."""

    def __init__(self, rosters: Rosters, site: str, key: Ed25519PrivateKey, rules: Rules) -> None:
        self._rosters = rosters
        self._site, self._key, self._rules = site, key, rules

    @property
    def minimum_cohort(self) -> int:
        """Fewer sites than this are never summed with this one, under the roster in force."""
        force = self._rosters.in_force()
        here = SMALLEST_COHORT if force is None else force.roster.minimum_cohort
        return max(SMALLEST_COHORT, here, self._rules.minimum_cohort)

    def under(self, digest: bytes, *, finishing: bool = False) -> Enrolment:
        """The enrolment under the roster that ``digest`` names. Raises ProtocolError, PolicyRefusal."""
        roster = self._rosters.with_digest(digest, finishing=finishing)
        number = next((member.id for member in roster.members if member.name == self._site), 0)
        return Enrolment(number, self._key, roster, self._rules)
