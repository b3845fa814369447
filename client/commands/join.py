"""``medfl-client --site site.yaml join invitation.json``: pin the consortium, see who is in, be one of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from medfl.shared.command import add_command

if TYPE_CHECKING:
    from medfl.shared.command import Commands

_EXAMPLE = "  medfl-client --site site.yaml join invitation.json"


def add(commands: Commands) -> None:
    """Declare ``join``."""
    summary = "check the coordinator's invitation against what was read over the telephone, and join"
    made = add_command(commands, "join", summary, _join, examples=_EXAMPLE)
    made.add_argument("invitation", type=Path, help="as it came from the coordinator")
    made.add_argument("--fingerprint", metavar="SHA256:...", help="the consortium's; absent: asked for here")
    made.add_argument("--roster", metavar="SHA256:...", help="confirm the other sites too: the roster's fingerprint")


def _join(options: argparse.Namespace) -> int:
    from medfl.client.commands.roster import confirm
    from medfl.client.config import load_site
    from medfl.client.joining import join, read_invitation
    from medfl.client.trust import site_rosters
    from medfl.shared.checklist import STEPS, checklist

    settings = load_site(options.site, writes=True)
    invitation, membership = read_invitation(options.invitation, settings)
    print(f"invitation to {membership.consortium}, whose coordinator is at {membership.coordinator}")
    given = options.fingerprint
    if given is None:
        print("Call the coordinator on a number that you did not get from this file, and have")
        print("its fingerprint read out; the first 16 characters after SHA256: are enough.")
        given = input("fingerprint of the consortium: ").strip()
    join(invitation, membership, settings, fingerprint=given)
    print(f"joined: {membership.consortium} is pinned here, with the fingerprint\n  {invitation.fingerprint}")
    status = confirm(settings, site_rosters(settings), fingerprint=options.roster)
    print(checklist(STEPS, done=4))
    return status
