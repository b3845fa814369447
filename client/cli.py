"""``medfl-client``: a hospital's node. Makes its keys, checks itself, trains what its policy allows."""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from medfl.shared.command import parser, run

if TYPE_CHECKING:
    from medfl.client.config import SiteSettings
    from medfl.shared.secagg.roster import Roster

_EXAMPLES = """\
  medfl-client keys /etc/medfl/keys --name north     keys and request.json
  medfl-client --site site.yaml --check --study study.json
  medfl-client --site site.yaml
  medfl-client --site site.yaml --audit report --from 2027-01-01 --out left.html"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``medfl-client``; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["keys"]:
        options = _parse_keys(given[1:])
        return run("medfl-client", lambda: _keys(options))
    options = _parse(given)
    if options.dry_run:
        return run("medfl-client", lambda: _dry_run(options))
    if options.audit is not None:
        return run("medfl-client", lambda: _audit(options))
    if options.confirm_roster:
        return run("medfl-client", lambda: _confirm(options))
    return run("medfl-client", lambda: _check(options) if options.check else _node(options))


def _parse(arguments: list[str]) -> argparse.Namespace:
    made = parser(
        "medfl-client",
        "A hospital's node: trains on local images what the site's policy allows. (medfl-client keys makes its keys.)",
        _EXAMPLES,
    )
    made.add_argument("--site", type=Path, required=True, metavar="FILE", help="the site, as YAML (any file name)")
    made.add_argument("--check", action="store_true", help="validate configuration, certificates, data, reach; exit")
    made.add_argument("--study", type=Path, metavar="FILE", help="with --check or --dry-run: the study")
    made.add_argument(
        "--dry-run", action="store_true", help="with --study: train one step, print what would be sent, exit"
    )
    made.add_argument("--confirm-roster", action="store_true", help="show the roster's keys, confirm them, exit")
    day = datetime.date.fromisoformat
    made.add_argument(
        "--audit", choices=("verify", "report"), help="is the log of what left unbroken; or show it; exit"
    )
    made.add_argument("--from", dest="since", type=day, metavar="DATE", help="with --audit report: first day, UTC")
    made.add_argument("--to", dest="until", type=day, metavar="DATE", help="with --audit report: last day, UTC")
    made.add_argument("--out", type=Path, metavar="FILE", help="with --audit report: one page FILE.html, or FILE.csv")
    made.add_argument("--head", metavar="HASH", help="with --audit verify: a hash noted earlier, to be found again")
    return made.parse_args(arguments)


def _parse_keys(arguments: list[str]) -> argparse.Namespace:
    made = parser("medfl-client keys", "Make a site's private keys, and the public request that enrols it.", _EXAMPLES)
    made.add_argument("folder", type=Path, help="a new folder, readable by this account only")
    made.add_argument("--name", required=True, help="the site's name in the consortium")
    return made.parse_args(arguments)


def _keys(options: argparse.Namespace) -> int:
    from medfl.shared.enrolment import make_request

    request = make_request(options.folder, options.name)
    print(f"keys of site {request.site} are in {options.folder}; they never leave this machine.")
    for what, value in request.fingerprints.items():
        print(f"  {what}  {value}")
    print(f"next: send {options.folder}/request.json to the coordinator, compare these by telephone,")
    print(f"and put the authority.pem and client.pem that come back into {options.folder}")
    return 0


def _audit(options: argparse.Namespace) -> int:
    from medfl.client.audit import audit_file
    from medfl.client.audit_report import Report, inspected, verified, write_report

    settings = _load(options.site)
    path = audit_file(settings.state)
    if options.audit == "verify":
        print("\n".join(verified(path, head=options.head)))
        return 0
    report = Report(settings.site, inspected(path), options.since, options.until)
    print("\n".join(write_report(report, options.out)))
    return 0 if report.inspection.problem is None else 3


def _confirm(options: argparse.Namespace) -> int:
    from contextlib import closing

    from medfl.client.audit import Audit, audit_file
    from medfl.client.runtime import confirmed_rosters
    from medfl.shared.errors import ConfigError
    from medfl.shared.secagg.roster import load_roster

    settings = _load(options.site)
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


def _dry_run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from medfl.client.dry_run import dry_run
    from medfl.shared.errors import ConfigError
    from medfl.shared.logs import set_up_logs

    set_up_logs(json_lines=options.log_format == "json", verbose=options.verbose)
    if options.study is None:
        raise ConfigError("--dry-run needs --study FILE: the study to try")
    dry_run(_load(options.site), options.study, Console())
    return 0


def _check(options: argparse.Namespace) -> int:
    from rich.console import Console

    from medfl.client.checks import check_site
    from medfl.shared.logs import set_up_logs

    set_up_logs(json_lines=options.log_format == "json", verbose=options.verbose)
    settings = _load(options.site)
    check_site(settings, study_file=options.study, console=Console())
    return 0


def _node(options: argparse.Namespace) -> int:
    from contextlib import ExitStack

    import medfl.shared.environment  # noqa: F401 - before flwr

    # isort: split
    from medfl.client.node import Node, Phase
    from medfl.client.runtime import build_site, gate_of, node_settings, open_audit
    from medfl.shared.logs import set_up_logs

    set_up_logs(json_lines=options.log_format == "json", verbose=options.verbose)
    settings = _load(options.site)
    from medfl.client.app import build_client_app
    from medfl.client.witness import Witness

    site = build_site(settings)
    with ExitStack() as stack:
        stack.callback(site.close)
        witness = Witness(stack.enter_context(open_audit(settings, options.site)), site)
        health = None
        if settings.health is not None:
            from medfl.shared.health import Health

            health = stack.enter_context(Health(settings.health.port, host=settings.health.host))

        def told(phase: Phase, text: str) -> None:
            if health is not None:
                health.set("not_serving" if phase is Phase.WAITING else "serving")

        app = build_client_app(lambda context: site, witness=witness)
        gate = gate_of(settings.policy)
        node = Node(node_settings(settings), app, gate, on_change=told, on_own_word=witness.node_says)
        for which in (signal.SIGTERM, signal.SIGINT):
            signal.signal(which, lambda *_: node.stop())
        node.run()
    return 0


def _load(path: Path) -> SiteSettings:
    from medfl.client.config import SiteSettings
    from medfl.shared.config import load_settings

    return load_settings(path, SiteSettings)


if __name__ == "__main__":
    sys.exit(main())
