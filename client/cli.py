"""``medfl-client``: a hospital's node. Enrols, checks itself, trains what its policy allows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medfl.client.commands import audit, enroll, join, node, roster, studies
from medfl.shared.command import commands_of, parser, run

_EXAMPLES = """\
  medfl-client --site site.yaml enroll --name north  keys and request.json
  medfl-client --site site.yaml join invitation.json
  medfl-client --site site.yaml --check --study study.json
  medfl-client --site site.yaml
  medfl-client --site site.yaml studies
  medfl-client --site site.yaml roster confirm
  medfl-client --site site.yaml audit report --from 2027-01-01 --out left.html"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``medfl-client``; returns the exit status."""
    options = _parser().parse_args(arguments)
    return run("medfl-client", lambda: int(options.work(options)))


def _parser() -> argparse.ArgumentParser:
    made = parser(
        "medfl-client",
        "A hospital's node: trains on local images what the site's policy allows. Without a command: runs it.",
        _EXAMPLES,
    )
    made.add_argument("--site", type=Path, required=True, metavar="FILE", help="the site, as YAML (any file name)")
    node.add(made)
    commands = commands_of(made)
    for command in (enroll, join, studies, roster, audit):
        command.add(commands)
    return made


if __name__ == "__main__":
    sys.exit(main())
