"""Which names and keys this site's administrator has confirmed; a roster with any other is refused.

A coordinator that could add keys alone could surround one hospital with sites that do not exist, and subtract them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from medfl.shared.errors import DataError, PolicyRefusal
from medfl.shared.files import private_folder, write_whole
from medfl.shared.secagg.limits import default_minimum_cohort
from medfl.shared.secagg.reasons import Reason
from medfl.shared.secagg.roster import Member, Roster


@dataclass(frozen=True, slots=True)
class _Confirmed:
    consortium: str = ""
    epoch: int = 0
    minimum_cohort: int = 0
    members: frozenset[Member] = frozenset()


class ConfirmedRoster:
    """A file ``roster.json`` in ``folder``: consortium, epoch, smallest cohort, and the confirmed (id, name, key)."""

    def __init__(self, folder: Path) -> None:
        self._path = private_folder(folder) / "roster.json"

    def confirm(self, roster: Roster) -> None:
        """Record that the administrator has compared every name and fingerprint of ``roster``.

        Raises:
            PolicyRefusal: ``roster`` is older than the one confirmed last.
        """
        before = self._read()
        if before.consortium == roster.consortium and roster.epoch < before.epoch:
            raise _older(roster, before)
        content = {
            "consortium": roster.consortium,
            "epoch": roster.epoch,
            "minimum_cohort": roster.minimum_cohort,
            "members": [[member.id, member.name, member.key.hex()] for member in roster.members],
        }
        write_whole(self._path, json.dumps(content, indent=1).encode())

    def unconfirmed(self, roster: Roster) -> tuple[Member, ...]:
        """Members of ``roster`` whose id, name and key the administrator has not confirmed together."""
        confirmed = self._read().members
        return tuple(member for member in roster.members if member not in confirmed)

    def check(self, roster: Roster, *, floor: int | None = None) -> None:
        """Return when every member of ``roster`` is confirmed. A site that has left needs no confirmation.

        ``floor``: the oldest epoch that still counts; absent, the one confirmed last.

        Raises:
            PolicyRefusal: another consortium, an older epoch, a member that nobody here has confirmed, or a smallest
                cohort below what the confirmed one has become by sites that left.
        """
        before = self._read()
        if before.consortium != roster.consortium:
            raise PolicyRefusal(
                f"no roster of {roster.consortium} has been confirmed here: compare its names and fingerprints with "
                "the other hospitals, then confirm it",
                reason=Reason.UNCONFIRMED_ROSTER,
            )
        if roster.epoch < (before.epoch if floor is None else floor):
            raise _older(roster, before)
        if new := self.unconfirmed(roster):
            names = ", ".join(f"{member.name} {member.fingerprint}" for member in new)
            raise PolicyRefusal(
                f"the roster of epoch {roster.epoch} has keys that nobody here has confirmed: {names}: compare them "
                "with these hospitals by telephone, then confirm the roster",
                reason=Reason.UNCONFIRMED_ROSTER,
            )
        if roster.minimum_cohort < _least_cohort(before, len(roster.members)):
            raise PolicyRefusal(
                f"the roster of epoch {roster.epoch} lets {roster.minimum_cohort} sites be summed, and "
                f"{before.minimum_cohort} was confirmed here: ask why, then confirm the roster",
                reason=Reason.UNCONFIRMED_ROSTER,
            )

    def _read(self) -> _Confirmed:
        try:
            content = json.loads(self._path.read_bytes())
            members = frozenset(Member(i, name, bytes.fromhex(key)) for i, name, key in content["members"])
            return _Confirmed(
                str(content["consortium"]), int(content["epoch"]), int(content["minimum_cohort"]), members
            )
        except FileNotFoundError:
            return _Confirmed()
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(
                "the file of confirmed keys cannot be read: restore the state folder from its backup, or "
                "remove it and confirm the roster again",
                reason=Reason.UNCONFIRMED_ROSTER,
            ) from None


def _least_cohort(before: _Confirmed, left: int) -> int:
    """What the confirmed smallest cohort asks of a roster with ``left`` of the confirmed sites.

    The usual one follows the number of sites. One above it was chosen: it stays, as long as there are so many sites.
    """
    chosen = before.minimum_cohort > default_minimum_cohort(len(before.members))
    return min(before.minimum_cohort, left if chosen else default_minimum_cohort(left))


def _older(roster: Roster, before: _Confirmed) -> PolicyRefusal:
    return PolicyRefusal(
        f"the roster has epoch {roster.epoch}, and epoch {before.epoch} was confirmed here: use the current one",
        reason=Reason.BAD_ROSTER,
    )
