"""``medfl-client --check``: everything that can be known before a study runs, in the order in which it would fail."""

from __future__ import annotations

from pathlib import Path

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from rich.console import Console
from rich.table import Table

from medfl.client.config import SiteSettings
from medfl.client.data.report import DataReport
from medfl.client.node import check as check_reach
from medfl.client.runtime import load_data, node_settings, site_device
from medfl.shared.certificates import WARN_DAYS, SiteFiles, check_certificate, common_name, load_certificate
from medfl.shared.config import load_settings
from medfl.shared.errors import ConfigError
from medfl.shared.keys import load_node_key, read_private
from medfl.shared.loading import LoadingBar
from medfl.shared.study import Study


def check_site(settings: SiteSettings, *, study_file: Path | None, console: Console) -> None:
    """Check keys, certificates, data and reach, and print what was found.

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
    console.print(f"device: {site_device(settings)}")
    console.print(f"approved studies: {len(settings.policy.studies)}")
    if study_file is not None:
        _check_study(settings, load_settings(study_file, Study), console)
    check_reach(node_settings(settings))
    console.print(f"coordinator {settings.coordinator}: reached, and it knows this site")


def _check_study(settings: SiteSettings, study: Study, console: Console) -> None:
    import datetime

    console.print(f"study {study.name}: {study.digest}")
    with LoadingBar(console) as loading:
        data = load_data(settings, study, site_device(settings), loading)
    print_report(data.report, console)
    settings.policy.permit(study, today=datetime.date.today())
    console.print("the policy permits this study")


def print_report(report: DataReport, console: Console) -> None:
    """What was found on the disk, as a table of counts: no file, no patient."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("patients", str(report.patients))
    table.add_row("studies, series, labels", f"{report.studies}, {report.series}, {report.labels}")
    for split, cases in report.cases.items():
        table.add_row(f"{split.value} cases", f"{cases} ({report.examples[split]} images)")
    for reason, count in sorted(report.quarantined.items()):
        table.add_row("[yellow]left out[/yellow]", f"{count}: {reason}")
    for label, share in report.class_balance.items():
        table.add_row(f"class {label}", f"{100 * share:.1f} %")
    table.add_row("read in", f"{report.seconds:.1f} s")
    console.print(table)
