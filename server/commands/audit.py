"""``medfl-server audit``: is the coordinator's own log unbroken; and all of it as a table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from medfl.shared.command import add_command, add_group, say

if TYPE_CHECKING:
    from medfl.shared.command import Commands

_VERIFY = "  medfl-server --config consortium.yaml audit verify --site north --head 3f1c..."
_REPORT = "  medfl-server --config consortium.yaml audit report --out sent-and-received.csv"


def add(commands: Commands) -> None:
    """Declare ``audit verify`` and ``audit report``."""
    inner = add_group(commands, "audit", "what this coordinator has sent and received")
    what = "is the log unbroken; was a head of a site's log seen"
    verify = add_command(inner, "verify", what, _verify, examples=_VERIFY)
    verify.add_argument("--head", metavar="HASH", help="a hash to be found: of this log, or with --site of a site's")
    verify.add_argument("--site", metavar="NAME", help="the site whose log has that hash")
    report = add_command(inner, "report", "every row, as CSV", _report, examples=_REPORT)
    report.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new FILE.csv")


def _verify(options: argparse.Namespace) -> int:
    from medfl.server.audit import seen_head
    from medfl.server.config import load_consortium
    from medfl.shared.audit_log import audit_file, inspected, verified
    from medfl.shared.errors import ConfigError

    path = audit_file(load_consortium(options.config, only_read=True).state)
    if options.site is None:
        say(verified(path, head=options.head))
        return 0
    if options.head is None:
        raise ConfigError("--site needs --head HASH: the hash of the last row of that site's log, or of an earlier one")
    say(verified(path))
    say([seen_head(inspected(path), site=options.site, digest=options.head)])
    return 0


def _report(options: argparse.Namespace) -> int:
    from medfl.server.audit import COLUMNS
    from medfl.server.config import load_consortium
    from medfl.shared.audit_log import audit_file, inspected, rows_as_csv
    from medfl.shared.files import write_whole

    found = inspected(audit_file(load_consortium(options.config, only_read=True).state))
    write_whole(options.out, rows_as_csv(found.rows, COLUMNS).encode())
    print(f"{len(found.rows)} rows written to {options.out}")
    if found.problem is not None:
        print(f"THE LOG DOES NOT VERIFY: {found.problem}")
    return 0 if found.problem is None else 3
