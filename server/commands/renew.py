"""``medfl-server renew``: a new certificate for the coordinator, for the same or another address; nobody is cut off."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from medfl.shared.command import add_command

if TYPE_CHECKING:
    from medfl.shared.command import Commands

_EXAMPLE = """\
  medfl-server renew                              the same address for another 397 days
  medfl-server renew --host new.example.org       the coordinator moves: sites are told where to"""


def add(commands: Commands) -> None:
    """Declare ``renew``."""
    summary = "renew the coordinator's certificate; with --host, move it to another address"
    made = add_command(commands, "renew", summary, _renew, examples=_EXAMPLE)
    made.add_argument("--host", nargs="+", default=[], help="what sites dial from now on, and further names")
    made.add_argument("--port", type=int, help="likewise; absent: as before")


def _renew(options: argparse.Namespace) -> int:
    from medfl.server.config import load_consortium
    from medfl.server.enrolling import Registrar

    settings = load_consortium(options.config)
    registrar = Registrar(settings)
    registrar.authority()  # asks for the passphrase before others have to wait
    with registrar.alone():
        until = registrar.renew_server(options.host, options.port)
        newest = registrar.rosters.newest()
    print(f"the coordinator's certificate is valid until {until.date()}; a running coordinator")
    print("shows it to new connections")
    print(f"sites dial {newest.coordinator} (roster epoch {newest.epoch})")
    port = int(newest.coordinator.rsplit(":", 1)[1])
    if port != settings.listen.port:
        print(f"consortium.yaml listens on port {settings.listen.port}: change listen.port to {port}, or forward")
    return 0
