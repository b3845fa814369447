"""The rosters this site knows: what the coordinator signed, what of it is confirmed here, what is in force.

Every roster is verified with the pinned key before anything of it is used, and an epoch never goes back. A roster
whose every key is confirmed is in force; a later one waits until the administrator has confirmed its new keys. What a
roster takes away (a revoked site, a replaced key: its ``floor``) holds at once, confirmed or not.
"""

from __future__ import annotations

import logging
from pathlib import Path
from threading import RLock

from medfl.client.pin import Pin
from medfl.client.secagg.confirmed_roster import ConfirmedRoster
from medfl.client.secagg.enrolment import other_roster
from medfl.shared.consortium import Membership, Site
from medfl.shared.errors import DataError, PolicyRefusal, ProtocolError
from medfl.shared.files import private_folder, write_whole
from medfl.shared.secagg.reasons import Reason
from medfl.shared.secagg.roster import Roster
from medfl.shared.signing import SignatureRefused, Signed

log = logging.getLogger("medfl.site")


class SiteRosters:
    """A folder with one signed file an epoch, and the confirmed keys. ``site`` and ``key``: whom it must have in it."""

    def __init__(self, folder: Path, pin: Pin, *, site: str, key: str) -> None:
        self.folder = private_folder(folder)
        self._pin = pin
        self._site, self._key = site, key
        self._lock = RLock()
        self._known: dict[int, Membership] = {}
        self.confirmed = ConfirmedRoster(folder)

    def receive(self, signed: Signed) -> Membership | None:
        """Keep a roster that is later than all known ones; returns it, or None when it is the one known already.

        Raises:
            SignatureRefused, ProtocolError: it is forged or malformed.
            PolicyRefusal: it is older than one known here, another one of the same epoch, or another consortium's.
        """
        with self._lock:
            new, newest = Membership.verified(signed, self._pin.key), self.newest()
            if new.consortium != self._pin.consortium:
                raise PolicyRefusal(f"the roster is of {new.consortium}, and {self._pin.consortium} is pinned here")
            if newest is not None:
                if new == newest:
                    return None
                if new.epoch <= newest.epoch:
                    raise _goes_back(new, newest)
                if new.floor < newest.floor:
                    raise PolicyRefusal(f"the roster of epoch {new.epoch} undoes what epoch {newest.floor} took away")
            write_whole(self.folder / f"{new.epoch}.json", signed.to_bytes())
            self._known[new.epoch] = new
            return new

    def newest(self) -> Membership | None:
        """The latest roster the coordinator has signed, confirmed or not; None before this site has joined.

        Raises:
            DataError: what is on the disk is not what was written there.
        """
        with self._lock:
            epochs = self._epochs()
            return self._at(max(epochs)) if epochs else None

    def newest_signed(self) -> bytes:
        """Its signed document, with which a coordinator that was restored from an old backup finds the way back."""
        return (self.folder / f"{max(self._epochs())}.json").read_bytes()

    def unconfirmed(self) -> tuple[Site, ...]:
        """Sites of the newest roster whose keys nobody here has confirmed. Raises DataError."""
        newest = self.newest()
        if newest is None:
            return ()
        new = {member.name for member in self.confirmed.unconfirmed(newest.roster)}
        return tuple(site for site in newest.sites if site.name in new)

    def removed(self) -> bool:
        """Whether the newest roster no longer has this site under its key. Raises DataError."""
        newest = self.newest()
        return newest is not None and not self._has_us(newest)

    def in_force(self) -> Membership | None:
        """The latest roster that this site sums under; None while there is none. Raises DataError."""
        with self._lock:
            for epoch in sorted(self._epochs(), reverse=True):
                membership = self._at(epoch)
                try:
                    self._accept(membership)
                except PolicyRefusal:
                    continue
                return membership
            return None

    def with_digest(self, digest: bytes, *, finishing: bool = False) -> Roster:
        """The roster that ``digest`` names, when a sum may be made under it (see ``Enrolments.under``).

        Raises:
            ProtocolError, PolicyRefusal, DataError: it is unknown, superseded or not confirmed.
        """
        with self._lock:
            for epoch in sorted(self._epochs(), reverse=True):
                membership = self._at(epoch)
                if membership.roster.digest == digest:
                    if not finishing:
                        self._accept(membership)
                    return membership.roster
            force = self.in_force()
            raise other_roster("any" if force is None else f"epoch {force.epoch}")

    def confirm(self, membership: Membership) -> None:
        """Record that the administrator has compared all names and fingerprints. Raises PolicyRefusal, DataError."""
        self.confirmed.confirm(membership.roster)

    def _accept(self, membership: Membership) -> None:
        newest = self.newest()
        if not self._has_us(membership) or newest is None or not self._has_us(newest):
            raise PolicyRefusal(
                f"the roster of epoch {membership.epoch} does not have this site under its key: it was removed from "
                "the consortium, or enrolled anew with another key",
                reason=Reason.BAD_ROSTER,
            )
        self.confirmed.check(membership.roster, floor=newest.floor)

    def _has_us(self, membership: Membership) -> bool:
        entry = membership.by_name.get(self._site)
        return entry is not None and entry.site_key == self._key

    def _epochs(self) -> list[int]:
        return [int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdigit()]

    def _at(self, epoch: int) -> Membership:
        if epoch not in self._known:
            try:
                signed = Signed.parse((self.folder / f"{epoch}.json").read_bytes())
                self._known[epoch] = Membership.verified(signed, self._pin.key)
            except (OSError, ProtocolError, SignatureRefused):
                raise DataError(
                    f"the roster of epoch {epoch} in {self.folder} is damaged: remove that file; the coordinator sends "
                    "the current roster again",
                    reason=Reason.BAD_ROSTER,
                ) from None
        return self._known[epoch]


def _goes_back(new: Membership, newest: Membership) -> PolicyRefusal:
    if new.epoch == newest.epoch:
        text = (
            f"the coordinator shows another roster of epoch {new.epoch} than before: it was restored from an old "
            "backup and changed since, or it shows different sites different rosters. Its next change (approve, "
            "revoke) makes a later epoch; compare the roster's fingerprint with another hospital then"
        )
    else:
        text = (
            f"the coordinator went back from roster epoch {newest.epoch} to {new.epoch}: it was restored from an old "
            "backup. It takes the current roster from its sites by itself; if this stays, restore its roster folder"
        )
    return PolicyRefusal(text, reason=Reason.BAD_ROSTER)
