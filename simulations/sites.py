"""Each virtual site's data: loaded or drawn, dealt out, as its scanner gives them, and spoilt where it cheats."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from medfl.client.data.headers import Progress
from medfl.client.data.load import load_site_data
from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import DicomSettings
from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.shared.errors import DataError
from medfl.shared.study import Study
from medfl.simulations.cast import attackers_of
from medfl.simulations.config import SimulationSettings, VirtualSiteSettings
from medfl.simulations.findings import counted
from medfl.simulations.heterogeneity import as_scanned
from medfl.simulations.misbehaviour import with_backdoor, with_flipped_labels
from medfl.simulations.partition import partition
from medfl.simulations.phantoms import write_hospital
from medfl.strategies.build import needs_of

log = logging.getLogger("medfl.simulations")


def load_sites(
    settings: SimulationSettings,
    study: Study,
    device: torch.device,
    loading: Progress | None = None,
    *,
    tell: Callable[[str], None] = log.warning,
) -> dict[str, SiteData]:
    """Each virtual site's data as its scanner gives them, split by patient by a secret of the seed and its name.

    ``tell`` hears, for the first seed, what is left out of each site's data and why.

    Raises:
        ConfigError: a study's strategy cannot run in it, before any image is read. DataError: data cannot be used.
    """
    for each in (study, *settings.studies().values()):
        needs_of(each)
    sites = {}
    for site in settings.sites:
        secret = hashlib.sha256(f"simulation/{study.seed}/{site.name}".encode()).digest()
        try:
            data = load_site_data(
                site.data or drawn(site, settings.output / "phantoms", loading),
                study.data,
                task=study.task.value,
                key=SiteKey(secret),
                device=device,
                progress=loading,
            )
        except DataError as error:
            raise DataError(f"site {site.name}: {error}") from None
        if not len(data.splits[Split.VALIDATION]):
            raise DataError(
                f"site {site.name} has no held-out patients, and every method is scored on them: set split.validation "
                "of its data above 0"
            )
        sites[site.name] = as_scanned(data, site.scanner, seed=_number(secret))
    if study.seed == settings.seeds[0]:
        for name, reasons in left_out_of(settings, sites).items():
            tell(f"site {name}: left out: {counted(reasons)}")
    if (how := settings.partition) is not None:
        (whole,) = sites.values()
        sites = partition(whole, how, seed=study.seed)
        if how.scanners:
            sites = {
                name: as_scanned(data, how.scanners[number % len(how.scanners)], seed=study.seed * 10_007 + number)
                for number, (name, data) in enumerate(sites.items())
            }
    for number, (name, attacker) in enumerate(attackers_of(settings, list(sites)).items()):
        if attacker.kind == "label-flip":
            sites[name] = with_flipped_labels(sites[name], len(study.data.classes))
        if attacker.kind == "backdoor":
            if attacker.target >= len(study.data.classes):
                raise DataError(f"attacker.target {attacker.target}: the last class is {len(study.data.classes) - 1}")
            sites[name] = with_backdoor(sites[name], attacker, seed=study.seed * 10_007 + number)
    return sites


def left_out_of(settings: SimulationSettings, sites: Mapping[str, SiteData]) -> dict[str, dict[str, int]]:
    """How many images or labels cannot be used, by site of the file and reason; without the sites that lack none.

    Parts of one site have its report, so that the first of them tells of all.
    """
    listed = zip(settings.sites, sites.values(), strict=False)
    return {site.name: dict(data.report.quarantined) for site, data in listed if data.report.quarantined}


def patients_of(data: SiteData, *splits: Split) -> int:
    """Patients of ``splits`` (none: of all) together."""
    return sum(int(torch.unique(data.splits[split].patients).numel()) for split in splits or data.splits)


def drawn(site: VirtualSiteSettings, folder: Path, progress: Progress | None = None) -> DicomSettings:
    """The site's phantom patients as DICOM files below ``folder``, drawn unless an earlier run has."""
    phantom = site.phantom
    assert phantom is not None  # noqa: S101 - the settings allow nothing else
    target = folder / f"scanner-{phantom.scanner}-patients-{phantom.patients}-seed-{phantom.seed}"
    if not target.exists():
        unfinished = target.with_name(target.name + ".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_hospital(unfinished, phantom.scanner, phantom.patients, phantom.seed, progress=progress)
        unfinished.rename(target)
    return DicomSettings(source="dicom", folder=target, split=phantom.split)


def _number(secret: bytes) -> int:
    return int.from_bytes(secret[:6], "big")
