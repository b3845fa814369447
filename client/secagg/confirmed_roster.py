"""Which names and keys this site's administrator has confirmed; a roster with any other is refused.

A coordinator that could add keys alone could surround one hospital with sites that do not exist, and subtract them.
"""

from __future__ import annotations

import json
from pathlib import Path

from medfl.shared.errors import DataError, PolicyRefusal
from medfl.shared.files import private_folder, write_whole
from medfl.shared.secagg.reasons import Reason
from medfl.shared.secagg.roster import Member, Roster


class ConfirmedRoster:
    """A file ``roster.json`` in ``folder``: consortium, epoch, and the confirmed (id, name, key)."""

    def __init__(self, folder: Path) -> None:
        self._path = private_folder(folder) / "roster.json"

    def confirm(self, roster: Roster) -> None:
        """Record that the administrator has compared every name and fingerprint of ``roster``.

        Raises:
            PolicyRefusal: ``roster`` is older than the one confirmed last.
        """
        consortium, epoch, _ = self._read()
        if consortium == roster.consortium and roster.epoch < epoch:
            raise self._older(roster, epoch)
        members = [[member.id, member.name, member.key.hex()] for member in roster.members]
        content = {"consortium": roster.consortium, "epoch": roster.epoch, "members": members}
        write_whole(self._path, json.dumps(content, indent=1).encode())

    def unconfirmed(self, roster: Roster) -> tuple[Member, ...]:
        """Members of ``roster`` whose id, name and key the administrator has not confirmed together."""
        _, _, confirmed = self._read()
        return tuple(member for member in roster.members if member not in confirmed)

    def check(self, roster: Roster) -> None:
        """Return when every member of ``roster`` is confirmed. A site that has left needs no confirmation.

        Raises:
            PolicyRefusal: another consortium, an older epoch, or a member that nobody here has confirmed.
        """
        consortium, epoch, _ = self._read()
        if consortium != roster.consortium:
            raise PolicyRefusal(
                f"no roster of {roster.consortium} has been confirmed here: compare its names and fingerprints with "
                "the other hospitals, then confirm it",
                reason=Reason.UNCONFIRMED_ROSTER,
            )
        if roster.epoch < epoch:
            raise self._older(roster, epoch)
        if new := self.unconfirmed(roster):
            names = ", ".join(f"{member.name} {member.fingerprint}" for member in new)
            raise PolicyRefusal(
                f"the roster of epoch {roster.epoch} has keys that nobody here has confirmed: {names}: compare them "
                "with these hospitals by telephone, then confirm the roster",
                reason=Reason.UNCONFIRMED_ROSTER,
            )

    def _older(self, roster: Roster, epoch: int) -> PolicyRefusal:
        return PolicyRefusal(
            f"the roster has epoch {roster.epoch}, and epoch {epoch} was confirmed here: use the current one",
            reason=Reason.BAD_ROSTER,
        )

    def _read(self) -> tuple[str, int, frozenset[Member]]:
        try:
            content = json.loads(self._path.read_bytes())
            members = frozenset(Member(i, name, bytes.fromhex(key)) for i, name, key in content["members"])
            return str(content["consortium"]), int(content["epoch"]), members
        except FileNotFoundError:
            return "", 0, frozenset()
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(
                "the file of confirmed keys cannot be read: restore the state folder from its backup, or confirm the "
                "roster again",
                reason=Reason.UNCONFIRMED_ROSTER,
            ) from None
