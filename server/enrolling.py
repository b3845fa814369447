"""Who belongs to the consortium, changed: a site approved, revoked, renewed; each change is a new signed epoch.

Certificates are on the disk before the roster that needs them, and the roster before the invitation that carries it:
a command that is killed in between is simply given again. Every change also puts on the list of revoked certificates
whatever an earlier one could not.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from pydantic import ValidationError

from medfl.server.config import ConsortiumSettings
from medfl.server.rosters import RosterFolder
from medfl.shared.addresses import address, dialled
from medfl.shared.certificates import (
    Authority,
    common_name,
    hosts_of,
    issue_client_certificate,
    load_certificate,
    load_tls_key,
    parse_certificate,
    read_authority,
    revocation_list,
    revoked_serials,
    server_certificate,
)
from medfl.shared.consortium import Membership, Site, consortium_fingerprint
from medfl.shared.enrolment import Invitation, Request
from medfl.shared.errors import ConfigError
from medfl.shared.files import private_folder, write_whole
from medfl.shared.keys import PUBLIC_FILE, load_site_key
from medfl.shared.lock import only_one
from medfl.shared.signing import load_signing_public_key


@dataclass(frozen=True, slots=True)
class Approved:
    """One site's outcome: where its invitation lies, and whether it is new, has a new key, or is as it was."""

    site: str
    invitation: Path
    what: str  # new, replaced, known


class Registrar:
    """Changes a consortium's roster. One at a time: hold :meth:`alone` around each change."""

    def __init__(self, settings: ConsortiumSettings) -> None:
        self._settings = settings
        self._trust = settings.trust
        self.rosters = RosterFolder.of(settings)

    def alone(self) -> AbstractContextManager[None]:
        """Keep other commands from changing the roster while the block runs. Raises ConfigError when one does."""
        return only_one(
            self._trust.roster, held="another approve, revoke or renew is being given here: wait for it, then try again"
        )

    @property
    def fingerprint(self) -> str:
        """The consortium's, which sites hear by telephone."""
        public = load_signing_public_key(self._trust.signing_key.with_name(f"{self._trust.signing_key.name}.pub"))
        return consortium_fingerprint(load_certificate(self._settings.tls.authority), public)

    def authority(self) -> Authority:
        """Who signs certificates; a passphrase of the keys is asked for now. Raises ConfigError when it is not here."""
        return read_authority(self._settings.tls.authority, self._trust.authority_key)

    def standing(self, request: Request) -> str:
        """What approving ``request`` would do: ``new``, ``replaced`` (another key of a known site), or ``known``.

        Raises:
            ConfigError: another site has one of its keys.
        """
        sites = self.rosters.newest().by_name
        for name, site in sites.items():
            if name != request.site and (site.site_key == request.site_key or site.node_key == request.node_key):
                raise ConfigError(f"site {name} has the same keys as {request.site}: each site makes its own")
        known = sites.get(request.site)
        if known is None:
            return "new"
        return "known" if (known.site_key, known.node_key) == (request.site_key, request.node_key) else "replaced"

    def approve(self, requests: Sequence[Request]) -> list[Approved]:
        """Certify every request and put all into one new roster; a request that is in it already is certified anew.

        Raises:
            ConfigError: doubles, more sites than a roster holds, or the authority's or the signing key cannot be had.
        """
        if len({request.site for request in requests}) != len(requests):
            raise ConfigError("two requests have the same site name: each site needs its own")
        authority = self.authority()
        standings = [self.standing(request) for request in requests]
        certificates = [self.certify(request, authority) for request in requests]
        before = self.rosters.newest()
        sites, next_id = dict(before.by_name), before.next_id
        for request, standing in zip(requests, standings, strict=True):
            number = sites[request.site].id if standing == "replaced" else next_id
            next_id += standing == "new"
            if standing != "known":
                keys = {"site_key": request.site_key, "node_key": request.node_key}
                sites[request.site] = Site(id=number, name=request.site, **keys)
        if any(standing != "known" for standing in standings):
            self._advance(before, sites=tuple(sites.values()), next_id=next_id, lowers="replaced" in standings)
        self._revoke_certificates(authority, requests)
        return [
            Approved(request.site, self._invite(request.site, authority, certificate), standing)
            for request, certificate, standing in zip(requests, certificates, standings, strict=True)
        ]

    def revoke(self, site: str) -> Membership:
        """Put a roster without ``site`` in force, and its certificates on the list of revoked ones.

        For a site that has left and whose certificates are not all on the list, the second only.

        Raises:
            ConfigError: there is no such site, or a key cannot be had; the roster is in force even where only the
                authority's key is missing.
        """
        membership = self.rosters.newest()
        if site in membership.by_name:
            left = tuple(entry for entry in membership.sites if entry.name != site)
            membership = self._advance(membership, sites=left, lowers=True)
        elif site not in self._outdated().values():
            known = ", ".join(sorted(membership.by_name)) or "none"
            raise ConfigError(f"the consortium has no site {site[:80]}: its sites are {known}")
        try:
            self._revoke_certificates(self.authority())
        except (ConfigError, OSError) as error:
            raise ConfigError(
                f"site {site} is out of the consortium (roster epoch {membership.epoch}) and cut off. Its certificates "
                f"are not on the list of revoked ones yet: {error}. Mend that and give revoke {site} again"
            ) from None
        return membership

    def certify(self, request: Request, authority: Authority) -> x509.Certificate:
        """Issue and record a certificate for the TLS key of ``request``. Raises ConfigError."""
        pem = issue_client_certificate(authority, request.site, request.tls_key)
        certificate = parse_certificate(pem, request.site)
        path = private_folder(self._trust.certificates) / f"{request.site}-{certificate.serial_number:x}.pem"
        write_whole(path, pem, mode=PUBLIC_FILE)
        return certificate

    def renew_server(self, hosts: Sequence[str], port: int | None) -> datetime.datetime:
        """A new certificate for the coordinator's key, for ``hosts`` (none: as before); returns until when.

        With other hosts or another port a new roster tells the sites where to dial.

        Raises:
            ConfigError: a host or the port is malformed, or the authority's key cannot be had.
        """
        tls, before = self._settings.tls, self.rosters.newest()
        number = int(before.coordinator.rsplit(":", 1)[1]) if port is None else port
        dial = address(hosts[0], number) if hosts else f"{before.coordinator.rsplit(':', 1)[0]}:{number}"
        try:
            dialled(dial)
        except ValueError as wrong:
            raise ConfigError(f"sites cannot dial {dial[:80]}: {wrong}") from None
        names = list(hosts) or hosts_of(load_certificate(tls.certificate))
        public = load_tls_key(tls.key).public_key()
        pem = server_certificate(self.authority(), public, names)
        if dial != before.coordinator:
            self._advance(before, coordinator=dial)
        write_whole(tls.certificate, pem, mode=PUBLIC_FILE)
        return parse_certificate(pem, "the new certificate").not_valid_after_utc

    def _advance(self, before: Membership, *, lowers: bool = False, **changes: object) -> Membership:
        epoch = before.epoch + 1
        unchanged = {name: getattr(before, name) for name in Membership.model_fields}
        values = {**unchanged, **changes, "epoch": epoch, "floor": epoch if lowers else before.floor}
        try:
            after = Membership.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = "".join(f"{part}: " for part in first["loc"])
            wrong = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"the roster of epoch {epoch} cannot be made: {where}{wrong}") from None
        return self.rosters.add(after.signed(load_site_key(self._trust.signing_key)))

    def _invite(self, site: str, authority: Authority, certificate: x509.Certificate) -> Path:
        signed, public = (
            self.rosters.newest_signed(),
            load_signing_public_key(self._trust.signing_key.with_name(f"{self._trust.signing_key.name}.pub")),
        )
        invitation = Invitation(site, authority.certificate, certificate, public, signed)
        path = private_folder(self._trust.roster.parent / "invitations") / f"{site}.json"
        write_whole(path, invitation.to_bytes(), mode=PUBLIC_FILE)
        return path

    def _revoke_certificates(self, authority: Authority, requests: Sequence[Request] = ()) -> None:
        """Bring the list of revoked certificates up to date with the roster in force and ``requests``, now approved."""
        outdated = self._outdated(requests)
        if outdated or not self._trust.revoked.exists():
            pem = revocation_list(authority, self._listed() | outdated.keys())
            write_whole(self._trust.revoked, pem, mode=PUBLIC_FILE)

    def _outdated(self, requests: Sequence[Request] = ()) -> dict[int, str]:
        """Serial numbers, with their sites, of certificates that TLS accepts and should not.

        Those of sites that have left, and those for another key than is in the one of ``requests`` that has their name.
        """
        sites, listed = self.rosters.newest().by_name, self._listed()
        keys = {request.site: request.tls_key for request in requests}
        found: dict[int, str] = {}
        for path in self._trust.certificates.glob("*.pem"):
            certificate = load_certificate(path)
            site = common_name(certificate)
            if site not in sites or (site in keys and certificate.public_key() != keys[site]):
                found[certificate.serial_number] = site
        return {serial: site for serial, site in found.items() if serial not in listed}

    def _listed(self) -> set[int]:
        return revoked_serials(self._trust.revoked) if self._trust.revoked.exists() else set()
