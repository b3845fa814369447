"""``medfl-client keys``: a site's private keys, and the public request that enrols it."""

from __future__ import annotations

import argparse
from pathlib import Path

from medfl.shared.command import parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the command."""
    example = "  medfl-client keys /etc/medfl/keys --name north"
    made = parser("medfl-client keys", "Make a site's private keys, and the public request that enrols it.", example)
    made.add_argument("folder", type=Path, help="a new folder, readable by this account only")
    made.add_argument("--name", required=True, help="the site's name in the consortium")
    return made.parse_args(arguments)


def work(options: argparse.Namespace) -> int:
    """Make the keys, say what to do next."""
    from medfl.shared.enrolment import make_request

    request = make_request(options.folder, options.name)
    print(f"keys of site {request.site} are in {options.folder}; they never leave this machine.")
    for what, value in request.fingerprints.items():
        print(f"  {what}  {value}")
    print(f"next: send {options.folder}/request.json to the coordinator, compare these by telephone,")
    print(f"and put the authority.pem and client.pem that come back into {options.folder}")
    return 0
