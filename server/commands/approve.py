"""``medfl-server approve request.json``: a fingerprint is compared; then certificate, roster and invitation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from medfl.shared.command import add_command

if TYPE_CHECKING:
    from medfl.shared.command import Commands

_EXAMPLE = """\
  medfl-server --config consortium/consortium.yaml approve north.json south.json
  medfl-server approve north.json --fingerprint SHA256:..."""
_WORDS = {
    "new": "is new",
    "replaced": "HAS ANOTHER KEY than before: every hospital will be asked to confirm it",
    "known": "is in the consortium already: it gets a new certificate",
}


def add(commands: Commands) -> None:
    """Declare ``approve``."""
    summary = "show a site's fingerprint, certify it, put it into the roster, write its invitation"
    made = add_command(commands, "approve", summary, _approve, examples=_EXAMPLE)
    made.add_argument("request", type=Path, nargs="+", help="request.json of a site; several make one new roster")
    made.add_argument(
        "--fingerprint",
        nargs="+",
        metavar="SHA256:...",
        help="of every request, as heard by telephone: nothing is asked then",
    )


def _approve(options: argparse.Namespace) -> int:
    from medfl.server.config import load_consortium
    from medfl.server.enrolling import Registrar
    from medfl.shared.checklist import STEPS, checklist
    from medfl.shared.enrolment import read_request
    from medfl.shared.errors import ConfigError, PolicyRefusal

    registrar = Registrar(load_consortium(options.config))
    requests = [read_request(path) for path in options.request]
    shown = [registrar.standing(request) for request in requests]
    for request, standing in zip(requests, shown, strict=True):
        print(f"site {request.site} {_WORDS[standing]}\n  {request.fingerprint}")
    if options.fingerprint is None:
        print("Call each site on a number that you did not get with its file, and compare.")
        if input("type yes when all are right: ").strip() != "yes":
            print("nothing was approved")
            return 3
    elif strangers := [r.site for r in requests if r.fingerprint not in options.fingerprint]:
        raise PolicyRefusal(f"site {strangers[0]} has none of the fingerprints given: nothing was approved")
    registrar.authority()  # asks for the passphrase
    with registrar.alone():  # not while somebody telephones or types: a revocation must not wait for that
        for request, standing in zip(requests, shown, strict=True):
            if registrar.standing(request) != standing:
                raise ConfigError(
                    f"the roster has changed since site {request.site} was shown: nothing was approved, give approve "
                    "again"
                )
        approved = registrar.approve(requests)
        newest = registrar.rosters.newest()
    print(f"roster epoch {newest.epoch}, {len(newest.sites)} sites; a running coordinator has it within seconds")
    print("send each site its file; it compares this by telephone when it joins:")
    print(f"  {registrar.fingerprint}")
    for outcome in approved:
        print(f"  {outcome.site}: {outcome.invitation}")
    print(f"fingerprint of the roster, the same at every hospital:\n  {newest.fingerprint}")
    print(checklist(STEPS, done=3))
    return 0
