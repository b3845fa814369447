"""``medfl-client --site site.yaml audit``: is the log of what left unbroken; and what left, as one page."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from medfl.shared.command import add_command, add_group, say

if TYPE_CHECKING:
    from medfl.shared.command import Commands

_VERIFY = "  medfl-client --site site.yaml audit verify --head 3f1c..."
_REPORT = "  medfl-client --site site.yaml audit report --from 2027-01-01 --to 2027-03-31 --out left.html"


def add(commands: Commands) -> None:
    """Declare ``audit verify`` and ``audit report``."""
    inner = add_group(commands, "audit", "what left this site")
    verify = add_command(inner, "verify", "is the log of what left unbroken", _verify, examples=_VERIFY)
    verify.add_argument("--head", metavar="HASH", help="a hash noted earlier, to be found again")
    report = add_command(inner, "report", "what left, when, how large, protected how", _report, examples=_REPORT)
    day = datetime.date.fromisoformat
    report.add_argument("--from", dest="since", type=day, metavar="DATE", help="first day, UTC")
    report.add_argument("--to", dest="until", type=day, metavar="DATE", help="last day, UTC")
    report.add_argument("--out", type=Path, metavar="FILE", help="one page FILE.html, or FILE.csv; absent: printed")


def _verify(options: argparse.Namespace) -> int:
    from medfl.client.config import load_site
    from medfl.client.receipts import check_receipt, reader_of
    from medfl.shared.audit_log import audit_file, inspected, verified

    settings = load_site(options.site)
    path = audit_file(settings.state)
    say(verified(path, head=options.head))
    say([check_receipt(path, inspected(path), reader_of(settings.keys))])
    return 0


def _report(options: argparse.Namespace) -> int:
    from medfl.client.audit_report import Report, write_report
    from medfl.client.config import load_site
    from medfl.shared.audit_log import audit_file, inspected

    settings = load_site(options.site)
    report = Report(settings.site, inspected(audit_file(settings.state)), options.since, options.until)
    say(write_report(report, options.out))
    return 0 if report.inspection.problem is None else 3
