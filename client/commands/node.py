"""``medfl-client --site site.yaml`` without a command: the node itself; or ``--check``; or ``--dry-run``."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Mapping


def add(made: argparse.ArgumentParser) -> None:
    """Declare the options of the main command."""
    made.add_argument("--check", action="store_true", help="validate configuration, certificates, data, reach; exit")
    made.add_argument(
        "--study",
        metavar="FILE|ID",
        help="with --check or --dry-run: the study's file, or its name or digest where it was offered",
    )
    made.add_argument(
        "--dry-run", action="store_true", help="with --study: train one step, print what would be sent, exit"
    )
    made.set_defaults(work=work)


def work(options: argparse.Namespace) -> int:
    """Run the node until it is stopped; or check; or try one step."""
    from medfl.shared.logs import set_up_logs

    set_up_logs(json_lines=options.log_format == "json", verbose=options.verbose, file=options.log_file)
    if options.dry_run:
        return _dry_run(options)
    return _check(options) if options.check else _node(options)


def _dry_run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from medfl.client.config import load_site
    from medfl.client.trust import chosen_study
    from medfl.shared.errors import ConfigError

    if options.study is None:
        raise ConfigError("--dry-run needs --study: the file of the study to try, or the name of one that was offered")
    settings, console = load_site(options.site, writes=True), Console()
    study = chosen_study(settings, options.study)
    with console.status("getting ready"):
        from medfl.client.dry_run import dry_run
    dry_run(settings, study, console)
    return 0


def _check(options: argparse.Namespace) -> int:
    from rich.console import Console

    from medfl.client.config import load_site

    settings, console = load_site(options.site), Console()
    with console.status("getting ready"):
        from medfl.client.checks import check_site
    check_site(settings, study=options.study, console=console)
    return 0


def _node(options: argparse.Namespace) -> int:  # noqa: PLR0915 - many of them imports
    from contextlib import ExitStack

    import medfl.shared.environment  # noqa: F401 - before flwr

    # isort: split
    from medfl.client.config import load_site
    from medfl.client.node import Node, Phase
    from medfl.client.runtime import build_site, check_ins, dialled, gate_of, node_settings, open_audit
    from medfl.client.trust import approvals_of
    from medfl.shared.admin import AdminSocket
    from medfl.shared.command import on_termination
    from medfl.shared.supervision import Supervision

    settings = load_site(options.site, writes=True)
    from medfl.client.app import build_client_app
    from medfl.client.decisions import Decisions
    from medfl.client.receipts import Receipts, reader_of
    from medfl.client.trouble import DeviceLost
    from medfl.client.witness import Witness
    from medfl.shared.audit_log import audit_file

    approvals = approvals_of(settings)
    site = build_site(settings, approvals)
    with ExitStack() as stack:
        stack.callback(site.close)
        site.check_ledger()
        watchers: list[Callable[[Phase, str], None]] = []
        on_row: Callable[[Mapping[str, str | float]], None] = lambda row: None  # noqa: E731
        if settings.health is not None:
            from medfl.shared.health import Health

            health = stack.enter_context(Health(settings.health.port, host=settings.health.host))
            watchers.append(lambda phase, text: health.set("not_serving" if phase is Phase.WAITING else "serving"))
        if settings.metrics is not None:
            from medfl.client.metrics import Gauges
            from medfl.client.privacy.ledger import spent_in_total
            from medfl.client.site import ceilings_of
            from medfl.shared.metrics_port import MetricsPort

            gauges = Gauges()
            gauges.spent(spent_in_total(settings.state / "ledger.jsonl", ceilings_of(settings.policy)))
            stack.enter_context(MetricsPort(gauges.registry, settings.metrics.port, host=settings.metrics.host))
            watchers.append(lambda phase, text: gauges.phase(phase))
            on_row = gauges.row

        def told(phase: Phase, text: str) -> None:
            for watcher in watchers:
                watcher(phase, text)

        audit = stack.enter_context(open_audit(settings, options.site, on_row=on_row))
        site.expect_journal(audit.journal)
        receipts = Receipts(audit_file(settings.state), reader_of(settings.keys), site=settings.site)
        lost = threading.Event()
        witness = Witness(audit, site, receipts)
        app = build_client_app(lambda context: site, witness=witness, on_device_lost=lost.set)
        node = Node(
            node_settings(settings),
            app,
            gate_of(approvals),
            on_change=told,
            on_own_word=witness.node_says,
            check_in=check_ins(settings, audit, work=lambda: site.work),
            address=dialled(settings),
            over=lost.is_set,
        )
        admin = AdminSocket(settings.state)
        decisions = Decisions(approvals, audit, forget=site.forget, take_up=site.take_up, changed=node.rejoin)
        decisions.serve(admin)  # before it listens
        stack.enter_context(admin)
        systemd = stack.enter_context(Supervision(node.alive))
        watchers.append(lambda phase, text: systemd.status(text))
        on_termination(node.stop)
        systemd.ready()
        node.run()
    if lost.is_set():  # a new process may find it again; this one cannot
        raise DeviceLost("the training device was lost: the service manager starts this node again")
    return 0
