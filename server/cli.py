"""``medfl-server``: found a consortium, check it, coordinate its studies."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medfl.server.commands import approve, audit, init, renew, revoke, serve, studies
from medfl.shared.command import commands_of, parser, run

_EXAMPLES = """\
  medfl-server init consortium --host fl.example.org
  medfl-server --config consortium/consortium.yaml approve north.json
  medfl-server --config consortium/consortium.yaml --check
  medfl-server --config consortium/consortium.yaml
  medfl-server --config consortium/consortium.yaml submit study.yaml
  medfl-server --config consortium/consortium.yaml status"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``medfl-server``; returns the exit status."""
    options = _parser().parse_args(arguments)
    return run("medfl-server", lambda: int(options.work(options)))


def _parser() -> argparse.ArgumentParser:
    made = parser("medfl-server", "Coordinate a federation of hospitals. Without a command: serve it.", _EXAMPLES)
    made.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the consortium, as YAML; absent: $MEDFL_CONSORTIUM, else ./consortium.yaml",
    )
    serve.add(made)
    commands = commands_of(made)
    for command in (init, approve, revoke, renew, studies, audit):
        command.add(commands)
    return made


if __name__ == "__main__":
    sys.exit(main())
