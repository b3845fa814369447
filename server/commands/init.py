"""``medfl-server init``: a consortium's authority, certificate, signing key, empty roster and configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from medfl.shared.command import add_command

if TYPE_CHECKING:
    from medfl.shared.command import Commands

_EXAMPLE = "  medfl-server init consortium --host fl.example.org"


def add(commands: Commands) -> None:
    """Declare ``init``."""
    summary = "make a consortium: authority, certificate, signing key, roster, configuration"
    made = add_command(commands, "init", summary, _init, examples=_EXAMPLE)
    made.add_argument("folder", type=Path, help="a new folder for the consortium")
    made.add_argument("--host", nargs="+", required=True, help="what sites dial, and further names or addresses")
    made.add_argument("--port", type=int, default=9443, help="9443 where absent; 443 passes most firewalls")
    made.add_argument("--listen", default="0.0.0.0", metavar="ADDRESS", help="of this machine; absent: all")  # noqa: S104
    made.add_argument("--name", help="of the consortium; absent: the folder's")
    made.add_argument("--minimum-cohort", type=int, metavar="N", help="fewer sites are never summed; absent: by size")
    made.add_argument("--passphrase", action="store_true", help="encrypt the private keys: see $MEDFL_PASSPHRASE_FILE")


def _init(options: argparse.Namespace) -> int:
    from medfl.server.founding import found
    from medfl.shared.checklist import STEPS, checklist
    from medfl.shared.owner import check_owner
    from medfl.shared.passphrase import new_passphrase

    check_owner(options.folder)
    fingerprint = found(
        options.folder,
        hosts=options.host,
        port=options.port,
        listen=options.listen,
        name=options.name,
        minimum_cohort=options.minimum_cohort,
        passphrase=new_passphrase() if options.passphrase else None,
    )
    print(f"the consortium is in {options.folder}: back it up")
    print("its authority.key may lie offline: see trust: in its consortium.yaml")
    print(f"sites compare this by telephone when they join:\n  {fingerprint}")
    print(checklist(STEPS, done=1))
    return 0
