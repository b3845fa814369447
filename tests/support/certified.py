"""A consortium's certificates and all its sites' keys in one folder, as no real consortium has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from medfl.shared.certificates import (
    LEAF_DAYS,
    Authority,
    SiteFiles,
    certificate_pem,
    create_authority,
    issue_client_certificate,
    issue_server_certificate,
    private_bytes,
    read_authority,
)
from medfl.shared.files import write_whole
from medfl.shared.keys import PUBLIC_FILE, create_node_key, create_site_key, write_new


@dataclass(frozen=True, slots=True)
class Consortium:
    """Where :func:`create_consortium` put everything."""

    authority: Path
    certificate: Path
    key: Path
    sites: dict[str, SiteFiles]


def create_consortium(folder: Path, *, sites: Sequence[str], hosts: Sequence[str]) -> Consortium:
    """Make an authority, the coordinator's certificate for ``hosts`` (names or addresses), and every site's files."""
    authority = create_authority(folder)
    issue_server_certificate(authority, folder, hosts)
    files = {site: create_site_files(authority, folder / "sites" / site, site) for site in sites}
    return Consortium(folder / "authority.pem", folder / "coordinator.pem", folder / "coordinator.key", files)


def create_site_files(authority: Authority, folder: Path, site: str, *, days: float = LEAF_DAYS) -> SiteFiles:
    """Make every file of :class:`SiteFiles` in ``folder``."""
    files = SiteFiles(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = issue_client_certificate(authority, site, key.public_key(), days=days)
    write_new(files.key, private_bytes(key))
    write_whole(files.certificate, certificate, mode=PUBLIC_FILE)
    write_whole(files.authority, certificate_pem(authority.certificate), mode=PUBLIC_FILE)
    create_node_key(files.node_key, comment=site)
    create_site_key(files.site_key, comment=site)
    return files


def load_authority(folder: Path) -> Authority:
    """Read what :func:`create_authority` wrote. Raises ConfigError when unreadable or not an authority."""
    return read_authority(folder / "authority.pem", folder / "authority.key")
