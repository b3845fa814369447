"""``medfl-client --site site.yaml enroll``: a site's keys, made on its own disk, and its public request."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from medfl.shared.command import add_command

if TYPE_CHECKING:
    from medfl.shared.command import Commands

_EXAMPLE = "  medfl-client --site site.yaml enroll --name north --coordinator fl.example.org:9443"


def add(commands: Commands) -> None:
    """Declare ``enroll``."""
    summary = "make this site's keys, and the request.json that the coordinator approves"
    made = add_command(commands, "enroll", summary, _enroll, examples=_EXAMPLE)
    made.add_argument("--name", help="where there is no site.yaml yet: this site's name; one is written then")
    made.add_argument("--coordinator", metavar="HOST:PORT", help="likewise: where to dial; absent: as invited")
    made.add_argument("--passphrase", action="store_true", help="encrypt the private keys: see $MEDFL_PASSPHRASE_FILE")


def _enroll(options: argparse.Namespace) -> int:
    from medfl.client.config import load_site
    from medfl.client.first_steps import write_first_site_file
    from medfl.shared.checklist import STEPS, checklist
    from medfl.shared.enrolment import make_keys
    from medfl.shared.errors import ConfigError
    from medfl.shared.owner import check_owner
    from medfl.shared.passphrase import new_passphrase

    if not options.site.exists():
        write_first_site_file(options.site, name=options.name, coordinator=options.coordinator)
        print(f"{options.site} is new: say in it where the images lie and what you allow")
    settings = load_site(options.site)
    check_owner(settings.keys)
    if options.name not in (None, settings.site):
        raise ConfigError(f"{options.site}: is of site {settings.site}, not of {options.name}: use another file")
    request = make_keys(settings.keys, settings.site, passphrase=new_passphrase() if options.passphrase else None)
    print(f"the keys of site {request.site} are in {settings.keys}; private ones never leave this machine")
    print(f"send to the coordinator, by mail or otherwise: {settings.keys / 'request.json'}")
    print(f"tell it by telephone, and later every other hospital that asks:\n  {request.fingerprint}")
    print(checklist(STEPS, done=2))
    return 0
