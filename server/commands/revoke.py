"""``medfl-server revoke SITE``: out of the consortium, at once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from medfl.shared.command import add_command

if TYPE_CHECKING:
    from medfl.shared.command import Commands


def add(commands: Commands) -> None:
    """Declare ``revoke``."""
    summary = "take a site out of the consortium, at once and at every other site"
    made = add_command(commands, "revoke", summary, _revoke, examples="  medfl-server revoke north")
    made.add_argument("site", help="its name")


def _revoke(options: argparse.Namespace) -> int:
    from medfl.server.config import load_consortium
    from medfl.server.enrolling import Registrar

    registrar = Registrar(load_consortium(options.config))
    with registrar.alone():
        membership = registrar.revoke(options.site)
    print(f"site {options.site} is revoked: roster epoch {membership.epoch}, {len(membership.sites)} sites")
    print("a running coordinator cuts it off within seconds; the other sites drop it from")
    print("their sums as soon as they hear of it, without anybody's confirmation. What it")
    print("has contributed to released models remains in them.")
    return 0
