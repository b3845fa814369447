"""``medfl-client``: a hospital's node. Enrols, checks itself, trains what its policy allows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medfl.client.commands import audit, keys, node, roster
from medfl.shared.command import commands_of, parser, run

_EXAMPLES = """\
  medfl-client keys /etc/medfl/keys --name north     keys and request.json
  medfl-client --site site.yaml --check --study study.json
  medfl-client --site site.yaml
  medfl-client --site site.yaml roster confirm
  medfl-client --site site.yaml audit report --from 2027-01-01 --out left.html"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``medfl-client``; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["keys"]:
        return run("medfl-client", lambda: keys.work(keys.parse(given[1:])))
    options = _parser().parse_args(given)
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
    for command in (roster, audit):
        command.add(commands)
    return made


if __name__ == "__main__":
    sys.exit(main())
