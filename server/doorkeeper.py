"""Who is let in, kept up while the coordinator runs: a changed roster or certificate on the disk takes effect at once.

Commands such as ``approve`` and ``revoke`` write files; this looks at them once a second. Sites check in every few
seconds: they are handed the newest roster and renewed certificates, are told when what they train on is over, and say
which roster is in force at each.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Self

from medfl.server.audit import Audit
from medfl.server.config import ConsortiumSettings
from medfl.server.enrolling import Registrar
from medfl.server.link import Link
from medfl.server.rosters import RosterFolder
from medfl.server.studies import State, StudyStore
from medfl.server.weight_sum import Chosen
from medfl.shared.certificates import WARN_DAYS, certificate_pem, days_left, load_certificate, read_authority
from medfl.shared.checkin import CheckedIn, CheckIn, verify
from medfl.shared.consortium import Membership
from medfl.shared.errors import ConfigError, MedFLError, PolicyRefusal, ProtocolError
from medfl.shared.secagg.roster import Roster
from medfl.shared.signing import Signed

log = logging.getLogger("medfl.server")

LOOK_S = 1.0
REMIND_S = 24 * 3600.0
CLOCK_TOLERANCE_S = 60.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Doorkeeper:
    """``with Doorkeeper(settings, link) as door: ...`` enrols the roster's sites, and keeps doing so."""

    def __init__(self, settings: ConsortiumSettings, link: Link, audit: Audit) -> None:
        self._settings = settings
        self._link = link
        self._audit = audit
        self._studies = StudyStore(settings.state)
        self._rosters = RosterFolder.of(settings)
        self._enrolled = self._noted = 0  # epochs: let in, and in the audit log
        self._seen: tuple[float, ...] = ()
        self._in_force: dict[str, int] = {}  # at each site that has checked in
        self._said: dict[str, float] = {}
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="doorkeeper", daemon=True)

    def __enter__(self) -> Self:
        """Let the roster's sites in. Raises ConfigError when there is no roster of this consortium."""
        self._seen = self._stamps()
        self._let_in()
        self._note()
        self._link.desk = self.answer
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look no longer."""
        self._left.set()
        self._thread.join(10)

    def answer(self, raw: bytes) -> bytes | None:
        """Answer a site's check-in; None to whoever is not a site of the roster."""
        try:
            claim, signature, content = CheckIn.parse(raw)
            newest = self._rosters.newest()
            entry = newest.by_name.get(claim.site)
            if entry is None:
                return None
            verify(entry.signer, signature, content)
        except MedFLError as error:
            log.warning("a check-in was thrown away: %s", error)
            return None
        with self._lock:
            self._in_force[claim.site] = claim.in_force
        self._compare(claim, newest)
        behind = claim.newest > newest.epoch
        return CheckedIn(
            time.time(),
            self._rosters.newest_signed() if claim.newest < newest.epoch else None,
            self._renewed(claim, entry.site_key, entry.node_key),
            send_roster=behind,
            over=self._over(claim.working_on),
        ).to_bytes()

    def choose(self, sites: Collection[str]) -> Chosen:
        """The roster under which most of ``sites`` can be summed together, and which of them those are.

        The newest one waits until every administrator has confirmed it, unless more sites wait for it than it costs.
        """
        newest = self._rosters.newest()
        best: tuple[tuple[int, int, int], Chosen] | None = None
        with self._lock:
            in_force = dict(self._in_force)
        for epoch in range(newest.floor, newest.epoch + 1):
            membership = self._rosters.at(epoch)
            if membership is None:
                continue
            known = [name for name in sites if name in membership.by_name]
            able = frozenset(name for name in known if in_force.get(name, epoch) >= epoch)
            rank = (len(able), len(able) - len(known), epoch)
            if best is None or rank > best[0]:
                best = rank, Chosen(membership.roster, able)
        return best[1] if best is not None else Chosen(newest.roster, frozenset())

    def with_digest(self, digest: bytes) -> Roster | None:
        """The roster of any epoch that a sum was begun with."""
        return self._rosters.with_digest(digest)

    def _watch(self) -> None:
        while not self._left.wait(LOOK_S):
            try:
                self._look()
            except MedFLError as error:
                self._say("trouble", logging.ERROR, str(error))
            except OSError as error:
                self._say("trouble", logging.ERROR, f"the consortium's files cannot be read ({error.strerror})")

    def _look(self) -> None:
        if self._rosters.newest_epoch != self._enrolled:
            self._let_in()
        self._note()
        if (stamps := self._stamps()) != self._seen:
            self._link.reload_tls()
            self._seen = stamps
            log.info("new connections see the certificate and the list of revoked ones that are on the disk now")
        days = days_left(load_certificate(self._settings.tls.certificate))
        if days < WARN_DAYS:
            text = f"the coordinator's certificate expires in {days:.0f} days: run medfl-server renew"
            self._say("certificate", logging.WARNING, text)

    def _let_in(self) -> None:
        newest = self._rosters.newest()
        self._link.enrol({site.name: site.node_key for site in newest.sites})
        self._enrolled = newest.epoch
        with self._lock:
            self._in_force = {site: epoch for site, epoch in self._in_force.items() if site in newest.by_name}
        log.info("roster of epoch %d: %s", newest.epoch, ", ".join(newest.by_name) or "no sites yet")

    def _note(self) -> None:
        """Write down who came and went; after the fact, for a revoked site is not let in for want of a disk."""
        if self._noted != self._enrolled:
            self._audit.note_rosters(self._enrolled, self._rosters.at)
            self._noted = self._enrolled

    def _stamps(self) -> tuple[float, ...]:
        paths = (self._settings.tls.certificate, self._settings.trust.revoked)
        return tuple(_changed_at(path) for path in paths)

    def _compare(self, claim: CheckIn, newest: Membership) -> None:
        """What a check-in tells about this coordinator: whether it forgot something, and whose clock is wrong."""
        ahead = claim.time - time.time()
        if abs(ahead) > CLOCK_TOLERANCE_S:
            side = "ahead of" if ahead > 0 else "behind"
            text = f"the clock of {claim.site} is {abs(ahead) / 60:.0f} minutes {side} this one: set both by NTP"
            self._say(f"clock {claim.site}", logging.WARNING, text)
        if claim.newest == newest.epoch and claim.fingerprint != newest.fingerprint:
            text = (
                f"site {claim.site} knows another roster of epoch {claim.newest} than the one here: this coordinator "
                "was restored from an old backup and changed since. The next approve or revoke makes a later one"
            )
            self._say(f"fork {claim.site}", logging.ERROR, text)
        if claim.roster is not None and claim.newest > newest.epoch:
            self._recover(claim.roster, claim.site)

    def _recover(self, signed: Signed, site: str) -> None:
        """Take from a site the roster that this coordinator signed and lost: it was restored from an old backup."""
        try:
            membership = self._rosters.add(signed)
        except (PolicyRefusal, ProtocolError, ConfigError) as error:
            self._say(f"recover {site}", logging.ERROR, f"the later roster that {site} holds cannot be used: {error}")
            return
        text = "this coordinator came from an old backup: the roster of epoch %d, signed here, was taken from %s"
        log.warning(text, membership.epoch, site)

    def _over(self, digest: str) -> bool:
        """Whether the study with ``digest`` was stopped or has ended: nobody waits for its training."""
        if _DIGEST.fullmatch(digest) is None:
            return False
        try:
            entry = self._studies.find(digest)
        except ConfigError:  # its files are damaged, which is told elsewhere
            return False
        return entry is not None and entry.record.state in (State.STOPPED, State.ENDED)

    def _renewed(self, claim: CheckIn, site_key: str, node_key: str) -> bytes:
        """A new certificate where the site asks for one with the keys of the roster; empty where the key is offline."""
        request = claim.renew
        if request is None or (request.site, request.site_key, request.node_key) != (claim.site, site_key, node_key):
            return b""
        try:
            authority = read_authority(self._settings.tls.authority, self._settings.trust.authority_key)
            certificate = Registrar(self._settings).certify(request, authority)
        except (ConfigError, OSError) as error:  # no key, or a disk that is full or read-only
            text = f"the certificate of {claim.site} expires soon and cannot be renewed here: {error}"
            self._say(f"renew {claim.site}", logging.WARNING, text)
            return b""
        log.info("the certificate of %s was renewed", claim.site)
        return certificate_pem(certificate)

    def _say(self, what: str, level: int, text: str) -> None:
        now = time.monotonic()
        if now - self._said.get(what, -REMIND_S - 1) > REMIND_S:
            log.log(level, "%s", text)
            self._said[what] = now


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
