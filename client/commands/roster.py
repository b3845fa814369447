"""``medfl-client --site site.yaml roster confirm``: the other hospitals' keys, compared by their administrators."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from medfl.shared.command import add_command, add_group

if TYPE_CHECKING:
    from medfl.client.config import SiteSettings
    from medfl.shared.command import Commands
    from medfl.shared.secagg.roster import Roster


def add(commands: Commands) -> None:
    """Declare ``roster confirm``."""
    inner = add_group(commands, "roster", "the hospitals of the consortium and their keys")
    add_command(inner, "confirm", "show the roster's keys and confirm them after a telephone call", _confirm)


def _confirm(options: argparse.Namespace) -> int:
    from contextlib import closing

    from medfl.client.audit import Audit, audit_file
    from medfl.client.config import load_site
    from medfl.client.runtime import confirmed_rosters
    from medfl.shared.errors import ConfigError
    from medfl.shared.secagg.roster import load_roster

    settings = load_site(options.site)
    if settings.secure_aggregation is None:
        raise ConfigError(f"{options.site}: secure_aggregation: is missing: name the roster's file there")
    roster = load_roster(settings.secure_aggregation.roster)
    with closing(Audit(audit_file(settings.state))) as audit:
        status = _compare(settings, roster)
        if status == 0:
            confirmed_rosters(settings).confirm(roster)
            audit.roster_confirmed(roster=roster.digest.hex(), epoch=roster.epoch, members=len(roster.members))
            print("confirmed")
    return status


def _compare(settings: SiteSettings, roster: Roster) -> int:
    """Show the roster's keys and ask whether they are right; returns the exit status."""
    from medfl.client.runtime import confirmed_rosters

    new = confirmed_rosters(settings).unconfirmed(roster)
    print(f"roster of {roster.consortium}, epoch {roster.epoch}, {len(roster.members)} sites, {len(new)} new here:")
    for member in roster.members:
        print(f"  {'new  ' if member in new else '     '}{member.name:20} {member.fingerprint}")
    if new:
        print("Compare each new fingerprint with that hospital, by telephone and not by way of the coordinator:")
        print("a key that belongs to nobody could uncover this site's updates.")
        if input("type yes when all are right: ").strip() != "yes":
            print("nothing was confirmed")
            return 3
    return 0
