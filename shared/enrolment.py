"""How a site joins: it makes its keys at home and sends a public request; the coordinator answers with certificates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from medfl.shared.certificates import (
    SiteFiles,
    check_site_name,
    create_authority,
    issue_client_certificate,
    issue_server_certificate,
)
from medfl.shared.errors import ConfigError
from medfl.shared.files import write_whole
from medfl.shared.keys import PUBLIC_FILE, create_node_key, create_site_key, fingerprint, read_public_key, write_new

_VERSION = 1
_MAX_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """What a site asks to be enrolled with; all of it is public."""

    site: str
    signing_request: x509.CertificateSigningRequest
    node_key: str  # the one line of node.key.pub
    site_key: str  # the one line of site.key.pub

    @property
    def fingerprints(self) -> dict[str, str]:
        """What to compare by telephone."""
        return {
            "node key": fingerprint(read_public_key(self.node_key)),
            "site key": fingerprint(read_public_key(self.site_key)),
        }


def make_request(folder: Path, site: str) -> Request:
    """Make a site's three private keys in ``folder`` (0600, never to leave) and ``request.json`` for the coordinator.

    Raises:
        ConfigError: the name is malformed, or a key is there already.
    """
    check_site_name(site)
    files = SiteFiles(folder)
    tls = ec.generate_private_key(ec.SECP384R1())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    write_new(files.key, tls.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    create_node_key(files.node_key, comment=site)
    create_site_key(files.site_key, comment=site)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    signing_request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(tls, hashes.SHA384())
    content = {
        "medfl_request": _VERSION,
        "site": site,
        "signing_request": signing_request.public_bytes(pem).decode(),
        "node_key": files.node_public_key.read_text("ascii").strip(),
        "site_key": files.site_public_key.read_text("ascii").strip(),
    }
    path = folder / "request.json"
    write_whole(path, json.dumps(content, indent=2).encode() + b"\n", mode=PUBLIC_FILE)
    return read_request(path)


def read_request(path: Path) -> Request:
    """Read what :func:`make_request` wrote, and check that the site holds the TLS key it asks a certificate for.

    Raises:
        ConfigError: unreadable, malformed, or not signed by its own key.
    """
    try:
        raw = path.read_bytes()
        if len(raw) > _MAX_BYTES:
            raise ValueError
        content = json.loads(raw)
        if content["medfl_request"] != _VERSION or not all(
            isinstance(content[key], str) for key in ("site", "signing_request", "node_key", "site_key")
        ):
            raise ValueError
        signing_request = x509.load_pem_x509_csr(content["signing_request"].encode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: is not a site's request: the site makes one with medfl-client keys") from None
    check_site_name(content["site"])
    subject = signing_request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if not signing_request.is_signature_valid or [name.value for name in subject] != [content["site"]]:
        raise ConfigError(f"{path}: was altered on its way: ask the site to send it again")
    request = Request(content["site"], signing_request, content["node_key"], content["site_key"])
    request.fingerprints  # noqa: B018 - parses both keys
    return request


def found_consortium(folder: Path, requests: Sequence[Request], *, hosts: Sequence[str]) -> None:
    """Make the authority, the coordinator's certificate for ``hosts``, and for each site ``sites/NAME/``: its
    certificate, the authority's, and its two public keys for the roster.

    Raises:
        ConfigError: two sites have one name, a host is malformed, or the folder holds a consortium already.
    """
    names = [request.site for request in requests]
    if len(set(names)) != len(names):
        raise ConfigError("two requests have the same site name: each site needs its own")
    authority = create_authority(folder)
    issue_server_certificate(authority, folder, hosts)
    for request in requests:
        public = request.signing_request.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise ConfigError(f"the request of site {request.site} has no EC key: make it with medfl-client keys")
        files = SiteFiles(folder / "sites" / request.site)
        files.folder.mkdir(parents=True, exist_ok=True)
        write_whole(files.certificate, issue_client_certificate(authority, request.site, public), mode=PUBLIC_FILE)
        write_whole(files.authority, authority.certificate.public_bytes(serialization.Encoding.PEM), mode=PUBLIC_FILE)
        write_whole(files.node_public_key, request.node_key.encode() + b"\n", mode=PUBLIC_FILE)
        write_whole(files.site_public_key, request.site_key.encode() + b"\n", mode=PUBLIC_FILE)
