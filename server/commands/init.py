"""``medfl-server init``: a consortium's authority, certificates and configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from medfl.shared.command import add_command

if TYPE_CHECKING:
    from medfl.shared.command import Commands

_EXAMPLE = "  medfl-server init consortium --host fl.example.org --request north.json south.json west.json"


def add(commands: Commands) -> None:
    """Declare ``init``."""
    made = add_command(
        commands, "init", "make a consortium's authority, certificates and configuration", _init, examples=_EXAMPLE
    )
    made.add_argument("folder", type=Path, help="a new folder for the consortium")
    made.add_argument("--request", type=Path, nargs="+", required=True, metavar="FILE", help="each site's request.json")
    made.add_argument("--host", nargs="+", required=True, help="names or addresses that sites dial")
    made.add_argument("--port", type=int, default=9443)


def _init(options: argparse.Namespace) -> int:
    from medfl.server.founding import found

    for line in found(options.folder, options.request, hosts=options.host, port=options.port):
        print(line)
    return 0
