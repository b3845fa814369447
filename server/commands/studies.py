"""``medfl-server submit study.yaml | list | status [ID] | stop ID | resume ID``: the consortium's studies."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from medfl.shared.command import account, add_command

if TYPE_CHECKING:
    from medfl.server.config import ConsortiumSettings
    from medfl.server.desk import Table
    from medfl.server.progress import Progress
    from medfl.shared.command import Commands

_SUBMIT = "  medfl-server --config consortium/consortium.yaml submit study.yaml"
_LIST = "  medfl-server list\n  medfl-server list --json"
_STATUS = "  medfl-server status            the study that runs, else the last one\n  medfl-server status liver-lesions"
_STOP = "  medfl-server stop 3f1c9a"
_RESUME = "  medfl-server resume 3f1c9a"
_ID = "a study's name, or the beginning of its digest"


def add(commands: Commands) -> None:
    """Declare the five commands."""
    submit = add_command(commands, "submit", "check, sign and queue a study", _submit, examples=_SUBMIT)
    submit.add_argument("study", type=Path, metavar="FILE", help="the study, as YAML")
    listed = add_command(commands, "list", "all studies and how far they are", _list, examples=_LIST)
    status = add_command(commands, "status", "one study: sites, scores, refusals", _status, examples=_STATUS)
    status.add_argument("study", nargs="?", metavar="ID", help=_ID)
    for made in (listed, status):
        made.add_argument("--json", action="store_true", help="for programs")
    stop = add_command(commands, "stop", "end a study, keep its checkpoint", _stop, examples=_STOP)
    resume = add_command(commands, "resume", "go on with a study that was stopped", _resume, examples=_RESUME)
    for made in (stop, resume):
        made.add_argument("study", metavar="ID", help=_ID)


def _submit(options: argparse.Namespace) -> int:
    from medfl.server.config import load_consortium
    from medfl.server.desk import SUBMIT, Submission, put
    from medfl.server.submission import desk_of, sign_study
    from medfl.shared.config import load_settings
    from medfl.shared.study import Study

    settings = load_consortium(options.config)
    signed = sign_study(settings, load_settings(options.study, Study), source=options.study)
    asked = Submission(signed=signed.to_bytes().decode(), by=account())
    found = put(settings.state, SUBMIT, asked, desk_of(settings).submit)
    print(f"study {found.study}: {found.digest}")
    print(f"signed and kept as number {found.number}; {_said(found)}")
    print(f"each site reads and approves it: medfl-client --site FILE approve {found.digest[:12]}")
    return 0


def _list(options: argparse.Namespace) -> int:
    from medfl.server.config import load_consortium

    table = _table(load_consortium(options.config, only_read=True))
    if options.json:
        print(table.model_dump_json(indent=1))
        return 0
    if not table.studies:
        print("no study was submitted yet: medfl-server submit study.yaml")
    else:
        print(f"{'nr':>3} {'study':23} {'digest':13}{'round':>9}  state")
    for found in table.studies:
        name = found.study if len(found.study) <= 23 else found.study[:22] + "…"
        rounds = f"{found.round}/{found.rounds}"
        print(f"{found.number:>3} {name:23} {found.digest[:12]:13}{rounds:>9}  {_said(found)}"[:80])
    _say_running(table)
    return 0


def _status(options: argparse.Namespace) -> int:
    from medfl.server.config import load_consortium
    from medfl.shared.errors import ConfigError

    settings = load_consortium(options.config, only_read=True)
    table = _table(settings)
    if not table.studies:
        raise ConfigError("no study was submitted yet: medfl-server submit study.yaml")
    running = [found for found in table.studies if found.state.value == "running"]
    found = (running or list(table.studies))[-1]
    if options.study is not None:
        digest = _which(settings, options.study)
        found = next(one for one in table.studies if one.digest == digest)
    if options.json:
        print(found.model_dump_json(indent=1))
        return 0
    print("\n".join(_lines(found)))
    _say_running(table)
    return 0


def _stop(options: argparse.Namespace) -> int:
    from medfl.server.config import load_consortium
    from medfl.server.desk import STOP, Named, put
    from medfl.server.submission import desk_of

    settings = load_consortium(options.config)
    asked = Named(digest=_which(settings, options.study), by=account())
    found = put(settings.state, STOP, asked, desk_of(settings).stop)
    ends = "ends now" if found.state.value == "running" else "is stopped"
    print(f"study {found.study} {ends} after round {found.round} of {found.rounds}; its checkpoint is kept")
    print(f"to go on: medfl-server resume {found.digest[:12]}")
    return 0


def _resume(options: argparse.Namespace) -> int:
    from medfl.server.config import load_consortium
    from medfl.server.desk import RESUME, Named, put
    from medfl.server.submission import desk_of

    settings = load_consortium(options.config)
    asked = Named(digest=_which(settings, options.study), by=account())
    found = put(settings.state, RESUME, asked, desk_of(settings).resume)
    print(f"study {found.study} goes on after round {found.round} of {found.rounds} when its turn comes")
    return 0


def _table(settings: ConsortiumSettings) -> Table:
    from medfl.server.desk import LIST, put
    from medfl.server.submission import desk_of
    from medfl.shared.admin import Nothing

    return put(settings.state, LIST, Nothing(), desk_of(settings).table)


def _which(settings: ConsortiumSettings, given: str) -> str:
    from medfl.server.studies import StudyStore
    from medfl.shared.study import named

    return named(given, (entry.study for entry in StudyStore(settings.state).entries())).digest


def _said(found: Progress) -> str:
    """The state in a few words."""
    if found.state.value == "running":
        return f"running{_left(found)}"
    return found.reason if found.state.value == "ended" else found.state.value


def _left(found: Progress) -> str:
    if found.seconds_left is None:
        return ""
    minutes = round(found.seconds_left / 60)
    return f", {minutes // 60}:{minutes % 60:02d} h left" if minutes >= 60 else f", about {max(minutes, 1)} min left"


def _lines(found: Progress) -> list[str]:
    lines = [
        f"study {found.study}",
        f"  digest     {found.digest}",
        f"  state      {_said(found)}",
        f"  round      {found.round} of {found.rounds}",
    ]
    if found.doing:
        lines.append(f"  now        {found.doing}")
    scores = [found.score, "" if found.loss is None else f"training loss {found.loss:.4f}"]
    if any(scores):
        lines.append(f"  scores     {', '.join(score for score in scores if score)}")
    for number, site in enumerate(sorted(found.sites | found.refusals)):
        refusal = found.refusals.get(site)
        state = f"does not take part: {refusal}" if refusal else found.sites.get(site, "")
        label, score = "sites" if number == 0 else "", found.site_scores.get(site, "")
        lines.append(f"  {label:11}{site:20} {state}  {score}".rstrip())
    if found.model:
        lines.append(f"  model      {found.model}")
    return [*lines, f"  folder     {found.folder}"]


def _say_running(table: Table) -> None:
    if not table.running:
        print("the coordinator does not run: start it with medfl-server --config FILE")
