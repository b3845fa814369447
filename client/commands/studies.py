"""``medfl-client --site site.yaml studies | approve ID | withdraw ID``: what is offered here, and what one decides."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeVar

from medfl.shared.command import add_command, say

if TYPE_CHECKING:
    from medfl.client.config import SiteSettings
    from medfl.shared.command import Commands

T = TypeVar("T")

_STUDIES = """\
  medfl-client --site site.yaml studies              what is offered, and its state
  medfl-client --site site.yaml studies 3f1c9a       one study in words"""
_APPROVE = '  medfl-client --site site.yaml approve 3f1c9a --by "Dr A. Example" --ethics 2026-123'
_WITHDRAW = '  medfl-client --site site.yaml withdraw 3f1c9a --by "Dr A. Example"'


def add(commands: Commands) -> None:
    """Declare ``studies``, ``approve`` and ``withdraw``."""
    listed = add_command(
        commands, "studies", "studies offered to this site; one of them in words", _studies, examples=_STUDIES
    )
    listed.add_argument("study", nargs="?", metavar="ID", help="a study's name, or the beginning of its digest")
    listed.add_argument("--json", action="store_true", help="for programs")
    approve = add_command(commands, "approve", "let this site take part in a study", _approve, examples=_APPROVE)
    approve.add_argument("study", metavar="ID", help="a study's name, or the beginning of its digest")
    approve.add_argument("--by", required=True, metavar="NAME", help="who decides: goes into the audit log")
    approve.add_argument("--ethics", default="", metavar="NUMBER", help="of this site's ethics vote")
    withdraw = add_command(
        commands, "withdraw", "leave a study at once, delete its cached images", _withdraw, examples=_WITHDRAW
    )
    withdraw.add_argument("study", metavar="ID", help="a study's name, or the beginning of its digest")
    withdraw.add_argument("--by", required=True, metavar="NAME", help="who decides: goes into the audit log")


def _studies(options: argparse.Namespace) -> int:
    from medfl.client.config import load_site

    settings = load_site(options.site)
    if options.json:
        return _as_json(settings, options.study)
    return _list(settings) if options.study is None else _show(settings, options.study)


def _list(settings: SiteSettings) -> int:
    from medfl.client.remains import remains_of
    from medfl.client.trust import approvals_of

    approvals = approvals_of(settings)
    offered = approvals.offered()
    if not offered:
        print("no study has been offered to this site yet")
        return 0
    print(f"{'study':26}{'digest':14}{'offered':12}{'rounds':>9}  state")
    for one in offered:
        study = one.study
        done = len(remains_of(settings.state, study.digest).rounds)
        name = study.name if len(study.name) < 26 else study.name[:24] + "…"
        state, rounds = approvals.standing(study.digest).value, f"{done}/{study.rounds.count}"
        print(f"{name:26}{study.digest[:12]:14}{one.since:%Y-%m-%d}  {rounds:>9}  {state}")
    print("\none of them in words: medfl-client --site FILE studies ID")
    return 0


def _show(settings: SiteSettings, given: str) -> int:
    from medfl.client.explain import explain, next_step
    from medfl.client.privacy.ledger import spent_in_total
    from medfl.client.remains import remains_of
    from medfl.client.runtime import local_day
    from medfl.client.site import ceilings_of
    from medfl.client.trust import approvals_of
    from medfl.shared.study import named

    approvals = approvals_of(settings)
    study = named(given, (one.study for one in approvals.offered()))
    spent = spent_in_total(settings.state / "ledger.jsonl", ceilings_of(settings.policy))
    today = local_day(settings)
    print("\n".join(explain(study, approvals, settings.policy, spent_total=spent, today=today)))
    remains = remains_of(settings.state, study.digest)
    if remains.rounds:
        print()
        say(remains.lines())
    print()
    print(next_step(study, approvals.standing(study.digest)))
    return 0


def _as_json(settings: SiteSettings, given: str | None) -> int:
    import json

    from medfl.client.remains import remains_of
    from medfl.client.trust import approvals_of
    from medfl.shared.study import named

    approvals = approvals_of(settings)
    offered = approvals.offered()
    if given is not None:
        wanted = named(given, (one.study for one in offered))
        offered = [one for one in offered if one.study.digest == wanted.digest]
    found = []
    for one in offered:
        digest, remains = one.study.digest, remains_of(settings.state, one.study.digest)
        decision, standing = approvals.decision(digest), approvals.standing(digest)
        found.append(
            {
                "study": one.study.name,
                "digest": digest,
                "offered": one.since.isoformat(timespec="seconds"),
                "state": standing.name.lower(),
                "runs": standing.runs,
                "decision": None if decision is None else decision.model_dump(mode="json"),
                "rounds": list(remains.rounds),
                "models": [{"round": number, "digest": model} for number, model in remains.models],
                "content": one.study.model_dump(mode="json"),
            }
        )
    print(json.dumps({"schema_version": 1, "studies": found}, indent=1))
    return 0


def _approve(options: argparse.Namespace) -> int:
    from medfl.client.config import load_site
    from medfl.client.decisions import Approval, approve
    from medfl.client.runtime import local_day
    from medfl.client.trust import approvals_of
    from medfl.shared.errors import PolicyRefusal

    settings = load_site(options.site, writes=True)
    digest, name = _which(settings, options.study)
    running = approve(settings, _checked(Approval, study=digest, by=options.by, ethics=options.ethics))
    print(f"study {name} is approved: it may run here{' from now on' if running else ' once the node is started'}")
    known = {one.study.digest: one.study for one in approvals_of(settings).offered()}
    if digest in known:
        try:
            approvals_of(settings).permit(known[digest], today=local_day(settings))
        except PolicyRefusal as refusal:
            say([f"but this site's policy still forbids it: {refusal}"])
            return refusal.exit_status
    return 0


def _withdraw(options: argparse.Namespace) -> int:
    from medfl.client.config import load_site
    from medfl.client.decisions import Withdrawal, withdraw
    from medfl.client.remains import remains_of

    settings = load_site(options.site, writes=True)
    digest, name = _which(settings, options.study)
    running = withdraw(settings, _checked(Withdrawal, study=digest, by=options.by))
    stopped = "a training of it has ended, nothing more leaves" if running else "nothing of it runs here"
    say([f"study {name} is withdrawn: {stopped}; its cached images cannot be opened any more."])
    say(remains_of(settings.state, digest).lines())
    if digest in settings.policy.studies:
        say(["Its digest still stands in policy.studies; the withdrawal counts more. Take it out all the same."])
    return 0


def _which(settings: SiteSettings, given: str) -> tuple[str, str]:
    """Digest and name of the study that is meant; a whole digest may be of one that was never offered here."""
    from medfl.client.trust import approvals_of
    from medfl.shared.study import named

    offered = [one.study for one in approvals_of(settings).offered()]
    if len(given) == 64 and not set(given) - set("0123456789abcdef") and all(one.digest != given for one in offered):
        return given, given[:12]
    study = named(given, offered)
    return study.digest, study.name


def _checked(kind: type[T], **values: str) -> T:
    from pydantic import ValidationError

    from medfl.shared.errors import ConfigError

    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ConfigError(f"--{first['loc'][-1]}: {first['msg'].removeprefix('Value error, ')}") from None
