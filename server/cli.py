"""``medfl-server``: found a consortium, check it, coordinate its studies."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from medfl.shared.command import parser, run

_EXAMPLES = """\
  medfl-server init consortium --host fl.example.org \\
               --request north.json south.json west.json
  medfl-server --config consortium/consortium.yaml --check
  medfl-server --config consortium/consortium.yaml"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``medfl-server``; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parse_init(given[1:]) if given[:1] == ["init"] else _parse(given)
    return run("medfl-server", lambda: _init(options) if hasattr(options, "request") else _serve(options))


def _parse(arguments: list[str]) -> argparse.Namespace:
    made = parser(
        "medfl-server",
        "Coordinate a federation of hospitals. (medfl-server init makes a consortium's keys and certificates.)",
        _EXAMPLES,
    )
    made.add_argument("--config", type=Path, required=True, metavar="FILE", help="the consortium, as YAML")
    made.add_argument("--check", action="store_true", help="validate everything, print the studies' digests, exit")
    return made.parse_args(arguments)


def _parse_init(arguments: list[str]) -> argparse.Namespace:
    made = parser("medfl-server init", "Make a consortium's authority, certificates and configuration.", _EXAMPLES)
    made.add_argument("folder", type=Path, help="a new folder for the consortium")
    made.add_argument("--request", type=Path, nargs="+", required=True, metavar="FILE", help="each site's request.json")
    made.add_argument("--host", nargs="+", required=True, help="names or addresses that sites dial")
    made.add_argument("--port", type=int, default=9443)
    return made.parse_args(arguments)


def _init(options: argparse.Namespace) -> int:
    from medfl.server.founding import found

    for line in found(options.folder, options.request, hosts=options.host, port=options.port):
        print(line)
    return 0


def _serve(options: argparse.Namespace) -> int:
    from contextlib import ExitStack
    from threading import Event

    import medfl.shared.environment  # noqa: F401 - before flwr

    # isort: split
    from rich.console import Console

    from medfl.server.config import ConsortiumSettings
    from medfl.server.console import reporter_for
    from medfl.server.coordinator import coordinate, load_studies, read_roster
    from medfl.server.rounds import Ending
    from medfl.shared.certificates import WARN_DAYS, check_certificate
    from medfl.shared.config import load_settings
    from medfl.shared.errors import ConfigError
    from medfl.shared.keys import node_public_key, read_private
    from medfl.shared.logs import set_up_logs

    set_up_logs(json_lines=options.log_format == "json", verbose=options.verbose)
    settings = load_settings(options.config, ConsortiumSettings)
    studies = load_studies(settings)
    days = check_certificate(settings.tls.certificate, authority=settings.tls.authority)
    read_private(settings.tls.key)
    for key in read_roster(settings).values():
        node_public_key(key)
    if options.check:
        print(f"consortium {settings.consortium}: {len(settings.sites)} sites, certificate valid for {days:.0f} days")
        if days < WARN_DAYS:
            print("the certificate expires soon: renew it")
        for study in studies:
            print(f"study {study.name}: {study.digest}")
        return 0
    if not studies and settings.when_done == "exit":
        raise ConfigError(f"{options.config}: studies: is empty: name a study file, or set when_done: stay")
    stop = Event()
    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, lambda *_: stop.set())
    with ExitStack() as stack:
        if settings.health is not None:
            from medfl.shared.health import Health

            health = stack.enter_context(Health(settings.health.port, host=settings.health.host))
            health.set("serving")
        endings = coordinate(settings, studies, reporter=reporter_for(Console(stderr=True)), stop=stop)
    return 0 if all(ending in (Ending.DONE, Ending.STOPPED) for ending in endings) else 1


if __name__ == "__main__":
    sys.exit(main())
