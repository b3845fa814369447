"""Joining a consortium: an invitation is checked, then pinned and installed, so that half a join is no join."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from medfl.client.audit import Audit
from medfl.client.config import SiteSettings
from medfl.client.pin import Pin, joined, load_pin
from medfl.client.rosters import SiteRosters
from medfl.shared.audit_log import audit_file
from medfl.shared.certificates import SiteFiles, certificate_pem
from medfl.shared.consortium import Membership
from medfl.shared.enrolment import Invitation, Request, make_request
from medfl.shared.errors import ConfigError, PolicyRefusal
from medfl.shared.files import write_whole
from medfl.shared.keys import PUBLIC_FILE

HEARD_CHARACTERS = 16
"""Enough of a fingerprint's beginning: they hold 96 bits."""


def read_invitation(path: Path, settings: SiteSettings) -> tuple[Invitation, Membership]:
    """An invitation that fits together and is for this site's keys. Whose it is, only its fingerprint tells.

    Raises:
        ConfigError: it is no invitation, or this site has no keys. PolicyRefusal, ProtocolError: it does not fit.
    """
    invitation = Invitation.read(path)
    return invitation, invitation.check(_own(settings))


def join(invitation: Invitation, membership: Membership, settings: SiteSettings, *, fingerprint: str) -> None:
    """Pin the consortium and install the certificate; again with a new invitation of the same one renews them.

    ``fingerprint``: the consortium's as heard by telephone, whole or the first 16 characters after ``SHA256:``.

    Raises:
        PolicyRefusal: ``fingerprint`` is not the invitation's, or too little of it; another consortium is pinned
            here; or the roster is older than the one known here.
    """
    typed = "".join(fingerprint.split()).removeprefix("SHA256:")
    if not invitation.fingerprint.removeprefix("SHA256:").startswith(typed):
        raise PolicyRefusal(
            f"the invitation is of a consortium with the fingerprint {invitation.fingerprint}, and you gave another: "
            "nothing was installed. Call the coordinator: somebody may have swapped the file"
        )
    if len(typed) < HEARD_CHARACTERS:
        raise PolicyRefusal(
            f"{len(typed)} characters are too few to compare: give at least {HEARD_CHARACTERS} after SHA256:. Nothing "
            "was installed"
        )
    pin = Pin(membership.consortium, invitation.signing_key)
    if joined(settings.keys) and load_pin(settings.keys) != pin:
        raise PolicyRefusal(
            f"another consortium is pinned here: to leave it, move {settings.keys / 'consortium.json'} away"
        )
    own = _own(settings)
    files = SiteFiles(settings.keys)
    SiteRosters(settings.state / "roster", pin, site=own.site, key=own.site_key).receive(invitation.roster)
    write_whole(files.authority, certificate_pem(invitation.authority), mode=PUBLIC_FILE)
    write_whole(files.certificate, certificate_pem(invitation.certificate), mode=PUBLIC_FILE)
    pin.save(settings.keys)  # last: with it the site has joined


def note_confirmation(settings: SiteSettings, membership: Membership) -> None:
    """Put a confirmation into the audit log; a running node, which holds the log, notes it by itself."""
    try:
        audit = Audit(audit_file(settings.state))
    except ConfigError:
        return
    with closing(audit):
        roster = membership.roster
        audit.roster_confirmed(roster=roster.digest.hex(), epoch=roster.epoch, members=len(roster.members))


def _own(settings: SiteSettings) -> Request:
    return make_request(SiteFiles(settings.keys), settings.site)
