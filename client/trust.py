"""From site.yaml to whom this site believes and where it dials: what light commands need of a joined site."""

from __future__ import annotations

from pathlib import Path

from medfl.client.approvals import Approvals
from medfl.client.config import SiteSettings
from medfl.client.pin import joined, load_pin
from medfl.client.rosters import SiteRosters
from medfl.shared.certificates import SiteFiles
from medfl.shared.config import load_settings
from medfl.shared.errors import ConfigError
from medfl.shared.keys import fingerprint, public_line, read_public_key
from medfl.shared.study import Study, named


def site_rosters(settings: SiteSettings) -> SiteRosters:
    """The rosters that the coordinator has signed, and the keys this site's administrator has confirmed.

    Raises:
        ConfigError: this site has not joined, or has lost its public site key.
    """
    path = SiteFiles(settings.keys).site_public_key
    try:
        key = public_line(read_public_key(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): restore the keys from their backup") from None
    return SiteRosters(settings.state / "roster", load_pin(settings.keys), site=settings.site, key=key)


def coordinator_address(settings: SiteSettings) -> str:
    """Where to dial: site.yaml's word, else the newest signed roster's. Raises ConfigError when neither says."""
    if settings.coordinator is not None:
        return settings.coordinator
    newest = site_rosters(settings).newest()
    if newest is None:
        raise ConfigError("coordinator: is missing, and no roster says where to dial: join the consortium first")
    return newest.coordinator


def approvals_of(settings: SiteSettings) -> Approvals:
    """The decisions of this site. Raises ConfigError, DataError: the pinned key or a decision cannot be read."""
    signer = fingerprint(load_pin(settings.keys).key) if joined(settings.keys) else ""
    return Approvals(settings.policy, settings.state, signer=signer)


def chosen_study(settings: SiteSettings, given: str) -> Study:
    """The study in the file that ``given`` names, else the one that was offered here under that name or digest.

    Raises:
        ConfigError: there is neither, or the file is no study.
    """
    path = Path(given)
    if path.exists() or path.suffix or len(path.parts) > 1:
        return load_settings(path, Study)
    return named(given, (one.study for one in approvals_of(settings).offered()))
