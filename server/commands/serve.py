"""``medfl-server --config consortium.yaml`` without a command: serve the sites, run the studies; or ``--check``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medfl.server.config import ConsortiumSettings
    from medfl.shared.study import Study


def add(made: argparse.ArgumentParser) -> None:
    """Declare the options of the main command."""
    made.add_argument("--check", action="store_true", help="validate everything, print fingerprints and digests, exit")
    made.set_defaults(work=work)


def work(options: argparse.Namespace) -> int:
    """Serve until the studies are done or the process is stopped; or check."""
    from contextlib import ExitStack
    from threading import Event

    import medfl.shared.environment  # noqa: F401 - before flwr

    # isort: split
    from rich.console import Console

    from medfl.server.config import consortium_file, load_consortium
    from medfl.server.console import reporter_for
    from medfl.server.coordinator import Members, coordinate, link_settings
    from medfl.server.desk import FINISHED
    from medfl.server.fleet_tls import FleetTls
    from medfl.server.reporter import Several
    from medfl.server.rosters import RosterFolder
    from medfl.server.studies import State, StudyStore
    from medfl.server.submission import listed_studies
    from medfl.shared.certificates import check_certificate
    from medfl.shared.command import on_termination
    from medfl.shared.errors import ConfigError
    from medfl.shared.logs import set_up_logs

    set_up_logs(json_lines=options.log_format == "json", verbose=options.verbose, file=options.log_file)
    file = consortium_file(options.config)
    settings = load_consortium(file, only_read=options.check)
    studies = listed_studies(settings)
    days = check_certificate(settings.tls.certificate, authority=settings.tls.authority)
    FleetTls(link_settings(settings).tls)
    RosterFolder.of(settings).newest()  # raises where no roster is in force
    if options.check:
        _check_signing_key(settings, studies)
        _tell(settings, studies, days)
        return 0
    if settings.when_done == "exit" and not studies and StudyStore(settings.state).next() is None:
        raise ConfigError(f"{file}: no study waits: submit one, name one under studies:, or set when_done: stay")
    stop = Event()
    on_termination(stop.set)
    with ExitStack() as stack:
        if settings.health is not None:
            from medfl.shared.health import Health

            health = stack.enter_context(Health(settings.health.port, host=settings.health.host))
            health.set("serving")
        reporter = reporter_for(Console(stderr=True))
        on_members: Callable[[Members], None] = lambda members: None  # noqa: E731
        if settings.metrics is not None:
            from medfl.server.metrics import Gauges
            from medfl.shared.metrics_port import MetricsPort

            gauges = Gauges()
            stack.enter_context(MetricsPort(gauges.registry, settings.metrics.port, host=settings.metrics.host))
            reporter, on_members = Several(reporter, gauges), gauges.watch
        records = coordinate(settings, reporter=reporter, stop=stop, on_members=on_members)
    return 0 if all(record.state is not State.ENDED or record.reason in FINISHED for record in records) else 1


def _check_signing_key(settings: ConsortiumSettings, studies: Sequence[Study]) -> None:
    """Open it, as a start does: without it no new study is signed, and sites get no receipts. Raises ConfigError."""
    from medfl.server.studies import StudyStore
    from medfl.shared.errors import ConfigError
    from medfl.shared.keys import load_site_key

    store = StudyStore(settings.state)
    try:
        load_site_key(settings.trust.signing_key)
    except ConfigError as why:
        if any(store.find(study.digest) is None for study in studies):
            raise
        print(f"sites will get no receipts, and no study can be signed: {why}")


def _tell(settings: ConsortiumSettings, studies: Sequence[Study], days: float) -> None:
    from medfl.server.enrolling import Registrar
    from medfl.shared.certificates import WARN_DAYS

    registrar = Registrar(settings)
    roster = registrar.rosters.newest()
    print(f"consortium {settings.consortium}; a site that joins compares\n  {registrar.fingerprint}")
    print(f"roster epoch {roster.epoch}, {len(roster.sites)} sites; the same at every hospital\n  {roster.fingerprint}")
    for site in roster.sites:
        print(f"  {site.name:20} {site.fingerprint}")
    print(f"certificate valid for {days:.0f} days")
    if days < WARN_DAYS:
        print("the certificate expires soon: medfl-server renew")
    for study in studies:
        print(f"study {study.name}: {study.digest}")
