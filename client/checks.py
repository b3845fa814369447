"""``medfl-client --check``: everything that can be known before a study runs, in the order in which it would fail."""

from __future__ import annotations

import os

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from rich.console import Console

from medfl.client.checkin import CANNOT_RENEW
from medfl.client.config import SiteSettings
from medfl.client.data.contact_sheet import write_contact_sheet
from medfl.client.node import check as check_reach
from medfl.client.privacy.ledger import spent_in_total
from medfl.client.runtime import build_participant, load_data, local_day, node_settings, site_device
from medfl.client.site import ceilings_of
from medfl.client.trust import approvals_of, chosen_study, coordinator_address, site_rosters
from medfl.shared.certificates import WARN_DAYS, SiteFiles, check_certificate, common_name, load_certificate
from medfl.shared.errors import ConfigError, DataError, PolicyRefusal
from medfl.shared.keys import load_node_key, read_private
from medfl.shared.loading import LoadingBar
from medfl.shared.study import Study


def check_site(settings: SiteSettings, *, study: str | None, console: Console) -> None:
    """Check keys, certificates, reach, and the data as ``study`` (a file, or one that was offered) would use them.

    Raises:
        ConfigError, DataError, PolicyRefusal, NetworkError: the first thing that would keep the site from training.
    """
    files = SiteFiles(settings.keys)
    load_node_key(files.node_key)
    read_private(files.key)
    days = check_certificate(files.certificate, authority=files.authority)
    name = common_name(load_certificate(files.certificate))
    if name != settings.site:
        raise ConfigError(f"{files.certificate}: is for site {name}, and this is site {settings.site}: use its own")
    console.print(f"site {settings.site}: keys are there, the certificate is valid for {days:.0f} days")
    if days < WARN_DAYS:
        console.print("[yellow]the certificate expires soon: ask the coordinator for a new one[/yellow]")
    if not os.access(settings.keys, os.W_OK):
        console.print(f"[yellow]{CANNOT_RENEW}[/yellow]")
    console.print(f"device: {site_device(settings)}")
    _check_roster(settings, console)
    console.print(f"approved studies: {len(approvals_of(settings).approved())}")
    spent = spent_in_total(settings.state / "ledger.jsonl", ceilings_of(settings.policy))
    allowed = settings.policy.max_epsilon_total
    console.print(f"privacy: epsilon {spent:.3f} of {allowed:g} is spent; the ledger is whole", highlight=False)
    if study is None:
        console.print("images: not looked at; --study FILE or ID does it as that study would")
    else:
        _check_study(settings, chosen_study(settings, study), console)
    with console.status("calling the coordinator"):
        check_reach(node_settings(settings))
    console.print(f"coordinator {coordinator_address(settings)}: reached, and it knows this site")


def _check_roster(settings: SiteSettings, console: Console) -> None:
    rosters = site_rosters(settings)
    build_participant(settings)
    newest, force = rosters.newest(), rosters.in_force()
    if rosters.removed():
        raise PolicyRefusal("this site is no longer in the consortium's roster under its key: call the coordinator")
    if force is not None:
        console.print(f"roster: epoch {force.epoch}, {len(force.sites)} sites, confirmed here")
    if newest is not None and newest != force:
        console.print(
            f"[yellow]roster: epoch {newest.epoch} waits for you: medfl-client --site FILE roster confirm[/yellow]"
        )


def _check_study(settings: SiteSettings, study: Study, console: Console) -> None:
    console.print(f"study {study.name}, digest")
    console.print(f"  {study.digest}", highlight=False)
    try:
        with LoadingBar(console) as loading:
            data = load_data(settings, study, site_device(settings), loading)
    except DataError as error:
        if names := getattr(error, "__notes__", None):
            console.print("segments here that are no class of the study (see data.aliases):")
            console.print("\n".join(names), markup=False, highlight=False)
        raise
    for line in data.report.lines():
        console.print(line, highlight=False)
    sheet = settings.state / "contact-sheet.html"
    write_contact_sheet(data, study.data, sheet)
    console.print("look at the images and outlines (only this account can read them):")
    console.print(f"  {sheet}", soft_wrap=True, markup=False, highlight=False)
    approvals_of(settings).permit(study, today=local_day(settings))
    console.print("the policy permits this study")
    if settings.policy.hours:
        console.print(f"it may run at these hours: {'; '.join(settings.policy.hours)}")
