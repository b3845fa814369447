"""The site's side of check-ins: takes in rosters and renewed certificates, and tells what a person has to do."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from math import inf
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfl.client.rosters import SiteRosters
from medfl.client.trouble import in_words
from medfl.client.work import Work
from medfl.shared.certificates import (
    WARN_DAYS,
    SiteFiles,
    common_name,
    days_left,
    load_certificate,
    parse_certificate,
    signed_by,
)
from medfl.shared.checkin import CheckedIn, CheckIn
from medfl.shared.consortium import Membership
from medfl.shared.enrolment import make_request
from medfl.shared.errors import MedFLError, PolicyRefusal
from medfl.shared.files import write_whole
from medfl.shared.keys import PUBLIC_FILE
from medfl.shared.signing import Signed

log = logging.getLogger("medfl.site")

CANNOT_RENEW = (
    "keys: this account cannot write there, so that a renewed certificate would be lost: let it, or move them"
)
REMIND_S = 3600.0  # what a person has to do is said again in this time
CLOCK_TOLERANCE_S = 60.0


class Line(Protocol):
    """What a check-in needs of the connection."""

    def check_in(self, question: bytes) -> bytes | None:
        """The coordinator's answer; None from one that does not know check-ins."""
        ...

    def reload_certificate(self) -> None:
        """Show the certificate that is on the disk now to new connections."""
        ...


class CheckIns:
    """Call it with the connection every few seconds, from any thread but one at a time.

    ``on_force`` is told each roster that comes into force while the node runs, before it is used here first.
    ``work`` is what is being trained: it is given up when the coordinator says that its study is over.
    """

    def __init__(
        self,
        site: str,
        files: SiteFiles,
        key: Ed25519PrivateKey,
        rosters: SiteRosters,
        *,
        on_force: Callable[[Membership], None] = lambda membership: None,
        work: Callable[[], Work | None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._site, self._files, self._key = site, files, key
        self._rosters = rosters
        self._on_force = on_force
        self._work = work
        self._clock = clock
        force = rosters.in_force()
        self._force = 0 if force is None else force.epoch
        self._send_roster = False
        self._said: dict[str, float] = {}

    def __call__(self, line: Line) -> None:
        """One question and its answer. Whatever is wrong with the answer is logged, and nothing of it used."""
        try:
            self._note_force()
            began, work = self._clock(), self._work()
            raw = line.check_in(self._question(began, "" if work is None else work.study))
            if raw is None:
                return
            answer = CheckedIn.parse(raw)
            if answer.over and work is not None:
                work.given_up = True
            self._compare_clocks(answer.time, began, self._clock())
            self._send_roster = answer.send_roster
            if answer.roster is not None:
                self._take(answer.roster)
            if answer.certificate:
                self._install(answer.certificate, line)
        except MedFLError as error:
            self._say("trouble", logging.ERROR, f"check-in: {error}")
        except OSError as error:  # on a full disk the heartbeat goes on, which says that this site is there
            self._say("trouble", logging.ERROR, f"check-in: {in_words(error) or error.strerror}")

    def _question(self, now: float, working_on: str) -> bytes:
        newest = self._rosters.newest()
        days = days_left(load_certificate(self._files.certificate))
        if not os.access(self._files.folder, os.W_OK):
            self._say("keys", logging.WARNING, CANNOT_RENEW)
        if days < WARN_DAYS:
            text = f"this site's certificate expires in {days:.0f} days; a new one is asked for"
            self._say("certificate", logging.WARNING, text)
        claim = CheckIn(
            self._site,
            self._force,
            0 if newest is None else newest.epoch,
            "" if newest is None else newest.fingerprint,
            now,
            make_request(self._files, self._site) if days < WARN_DAYS else None,
            Signed.parse(self._rosters.newest_signed()) if self._send_roster and newest is not None else None,
            working_on,
        )
        return claim.signed(self._key)

    def _take(self, signed: Signed) -> None:
        new = self._rosters.receive(signed)
        if new is not None:
            log.info("roster of epoch %d received, %d sites", new.epoch, len(new.sites))
        self._note_force()

    def _note_force(self) -> None:
        """Say which roster is in force, when that has changed, and what waits for the administrator."""
        force = self._rosters.in_force()
        epoch = 0 if force is None else force.epoch
        if force is not None and epoch != self._force:
            self._on_force(force)
            log.info("roster of epoch %d is in force: %s", epoch, ", ".join(site.name for site in force.sites))
        self._force = epoch
        if self._rosters.removed():
            text = "this site is no longer in the consortium's roster under its key: call the coordinator"
            self._say("removed", logging.ERROR, text)
        elif waiting := [site for site in self._rosters.unconfirmed() if site.name != self._site]:
            names = ", ".join(f"{site.name} {site.fingerprint}" for site in waiting)
            text = f"new keys wait to be confirmed here (medfl-client --site FILE roster confirm): {names}"
            self._say(text, logging.WARNING, text)

    def _install(self, pem: bytes, line: Line) -> None:
        """Replace our certificate by a renewed one, which must be for our name and key. Raises PolicyRefusal."""
        new = parse_certificate(pem, "the renewed certificate")
        old = load_certificate(self._files.certificate)
        ours = (common_name(new), new.public_key()) == (self._site, old.public_key())
        if not ours or not signed_by(new, load_certificate(self._files.authority)):
            raise PolicyRefusal("the coordinator sent a certificate that is not for this site's key: it is not used")
        write_whole(self._files.certificate, pem, mode=PUBLIC_FILE)
        line.reload_certificate()
        log.info("certificate renewed: valid for another %.0f days", days_left(new))

    def _compare_clocks(self, theirs: float, began: float, ended: float) -> None:
        ahead = (began + ended) / 2 - theirs
        if abs(ahead) > CLOCK_TOLERANCE_S + (ended - began):
            text = f"this machine's clock is {clock_words(ahead)} the coordinator's: set both by NTP"
            self._say("clock", logging.WARNING, text)

    def _say(self, what: str, level: int, text: str) -> None:
        if time.monotonic() - self._said.get(what, -inf) > REMIND_S:
            log.log(level, "%s", text)
            self._said[what] = time.monotonic()


def clock_words(ahead_s: float) -> str:
    """Difference of two clocks in words: ``7 minutes ahead of``.

    >>> clock_words(-420.0), clock_words(7.2)
    ('7 minutes behind', '7 seconds ahead of')
    """
    size = abs(ahead_s)
    unit, count = ("minutes", size / 60) if size >= 120 else ("seconds", size)
    return f"{count:.0f} {unit} {'ahead of' if ahead_s > 0 else 'behind'}"
