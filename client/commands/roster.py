"""``medfl-client --site site.yaml roster``: the other hospitals' keys, compared by their administrators."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from medfl.shared.command import add_command, add_group

if TYPE_CHECKING:
    from medfl.client.config import SiteSettings
    from medfl.client.rosters import SiteRosters
    from medfl.shared.command import Commands
    from medfl.shared.consortium import Membership

_EXAMPLE = "  medfl-client --site site.yaml roster confirm"


def add(commands: Commands) -> None:
    """Declare ``roster show`` and ``roster confirm``."""
    inner = add_group(commands, "roster", "the hospitals of the consortium and their keys")
    add_command(inner, "show", "the newest roster, and what of it is confirmed here", _show)
    summary = "compare the roster's new keys with those hospitals, and confirm them"
    made = add_command(inner, "confirm", summary, _confirm, examples=_EXAMPLE)
    made.add_argument("--fingerprint", metavar="SHA256:...", help="the roster's, compared elsewhere: nothing is asked")


def _show(options: argparse.Namespace) -> int:
    from medfl.client.config import load_site
    from medfl.client.trust import site_rosters

    settings = load_site(options.site)
    rosters = site_rosters(settings)
    newest, force = rosters.newest(), rosters.in_force()
    if newest is None:
        print("no roster has come yet")
        return 0
    _print(newest, _others(settings, rosters))
    print("in force: " + ("none" if force is None else f"epoch {force.epoch}"))
    return 0


def _confirm(options: argparse.Namespace) -> int:
    from medfl.client.config import load_site
    from medfl.client.trust import site_rosters

    settings = load_site(options.site, writes=True)
    return confirm(settings, site_rosters(settings), fingerprint=options.fingerprint)


def confirm(settings: SiteSettings, rosters: SiteRosters, *, fingerprint: str | None) -> int:
    """Show the newest roster and have its new keys confirmed, by a person or by its fingerprint; the exit status.

    Raises:
        ConfigError: none has come. PolicyRefusal: ``fingerprint`` is another roster's.
    """
    from medfl.client.joining import note_confirmation
    from medfl.shared.errors import ConfigError, PolicyRefusal

    newest = rosters.newest()
    if newest is None:
        raise ConfigError("no roster has come yet: join the consortium first")
    others = _others(settings, rosters)
    _print(newest, others)
    # Whole: a coordinator could make two rosters that begin alike, for two sites that compare a beginning.
    if fingerprint is not None and fingerprint.strip() != newest.fingerprint:
        raise PolicyRefusal("the roster has another fingerprint than the one given: nothing was confirmed")
    if others and fingerprint is None:
        print("Compare each new fingerprint with that hospital, by telephone and not by way of")
        print("the coordinator: a key that belongs to nobody could uncover this site's updates.")
        if input("type yes when all are right: ").strip() != "yes":
            print("nothing was confirmed; later: medfl-client --site FILE roster confirm")
            return 3
    rosters.confirm(newest)
    note_confirmation(settings, newest)
    print("confirmed: a running node uses it from now on")
    return 0


def _others(settings: SiteSettings, rosters: SiteRosters) -> set[str]:
    """Names of the other sites whose keys are not confirmed here; our own needs no telephone call."""
    return {site.name for site in rosters.unconfirmed()} - {settings.site}


def _print(newest: Membership, new: set[str]) -> None:
    print(f"roster of {newest.consortium}, epoch {newest.epoch}, {len(newest.sites)} sites, {len(new)} new here:")
    for site in newest.sites:
        print(f"  {'new  ' if site.name in new else '     '}{site.name:20} {site.fingerprint}")
    print(f"fingerprint of this roster, the same at every hospital:\n  {newest.fingerprint}")
