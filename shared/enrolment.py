"""How a site joins, in public files: its request, made with its keys at home, and the invitation that answers it.

No private key is in either. The request is signed with the site key, whose fingerprint the coordinator hears by
telephone; the invitation is worth as much as the consortium's fingerprint, which the site hears by telephone.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID

from medfl.shared.certificates import (
    SiteFiles,
    check_site_name,
    common_name,
    load_tls_key,
    parse_certificate,
    private_bytes,
    signed_by,
)
from medfl.shared.consortium import Membership, consortium_fingerprint
from medfl.shared.errors import ConfigError, PolicyRefusal, ProtocolError
from medfl.shared.files import write_whole
from medfl.shared.keys import (
    PUBLIC_FILE,
    complete_pair,
    create_node_key,
    create_site_key,
    fingerprint,
    load_node_key,
    load_site_key,
    public_line,
    read_public_key,
    write_new,
)
from medfl.shared.signing import Signed, parse_signing_key

_VERSION = 2
_MAX_REQUEST_BYTES = 16 * 1024
_MAX_INVITATION_BYTES = 8 * 1024 * 1024
_REQUEST_DOMAIN = b"MedFL request, version 2\0"
_REQUEST_KEYS = ("site", "signing_request", "node_key", "site_key")
_INVITATION_KEYS = ("site", "authority", "certificate", "signing_key", "roster")


@dataclass(frozen=True, slots=True)
class Request:
    """What a site asks to be enrolled with, or to have its certificate renewed with; all of it is public."""

    site: str
    signing_request: x509.CertificateSigningRequest
    tls_key: ec.EllipticCurvePublicKey  # of the signing request: what is to be certified
    node_key: str  # one line
    site_key: str  # one line
    signature: bytes  # of the site key, over all of the above

    @property
    def fingerprint(self) -> str:
        """``SHA256:...`` of the site key, as ``ssh-keygen -lf site.key.pub`` prints it: to compare by telephone."""
        return fingerprint(read_public_key(self.site_key))

    def to_bytes(self) -> bytes:
        """As JSON."""
        pem = self.signing_request.public_bytes(serialization.Encoding.PEM).decode()
        fields = dict(zip(_REQUEST_KEYS, (self.site, pem, self.node_key, self.site_key), strict=True))
        signature = base64.b64encode(self.signature).decode()
        return json.dumps({"medfl_request": _VERSION, **fields, "signature": signature}, indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, raw: bytes, *, name: str = "the request") -> Self:
        """Read a request, and check that whoever wrote it holds the site key and the TLS key; ``name`` begins errors.

        Raises:
            ConfigError: malformed, altered, or signed with other keys than its own.
        """
        try:
            fields = _read(raw, "medfl_request", _REQUEST_KEYS, _MAX_REQUEST_BYTES)
            signing_request = x509.load_pem_x509_csr(fields["signing_request"].encode())
            signature = base64.b64decode(fields["signature"], validate=True)
            public = signing_request.public_key()
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(f"{name}: is not a site's request: the site makes one with medfl-client enroll") from None
        check_site_name(fields["site"])
        key = read_public_key(fields["site_key"])
        if not isinstance(key, Ed25519PublicKey) or not isinstance(public, ec.EllipticCurvePublicKey):
            raise ConfigError(f"{name}: has keys of another kind: the site makes them with medfl-client enroll")
        read_public_key(fields["node_key"])
        subject = [name.value for name in signing_request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        try:
            key.verify(signature, _to_sign(fields))
            if not signing_request.is_signature_valid or subject != [fields["site"]]:
                raise InvalidSignature
        except InvalidSignature:
            raise ConfigError(f"{name}: was altered on its way: ask the site to send it again") from None
        return cls(fields["site"], signing_request, public, fields["node_key"], fields["site_key"], signature)


def make_keys(folder: Path, site: str, *, passphrase: bytes | None = None) -> Request:
    """Make those of a site's three keys that ``folder`` lacks (0600), and ``request.json`` for the coordinator.

    A public half that was lost is written again.

    Raises:
        ConfigError: the name is malformed, or a key that is there cannot be used.
    """
    check_site_name(site)
    files = SiteFiles(folder)
    if not files.key.exists():
        write_new(files.key, private_bytes(ec.generate_private_key(ec.SECP384R1()), passphrase))
    if not files.node_key.exists():
        create_node_key(files.node_key, comment=site, passphrase=passphrase)
    if not files.site_key.exists():
        create_site_key(files.site_key, comment=site, passphrase=passphrase)
    request = make_request(files, site)
    for path, line in ((files.node_key, request.node_key), (files.site_key, request.site_key)):
        complete_pair(path, read_public_key(line), comment=site)
    write_whole(folder / "request.json", request.to_bytes(), mode=PUBLIC_FILE)
    return request


def make_request(files: SiteFiles, site: str) -> Request:
    """A request with the keys in ``files``: to enrol, or to have the certificate renewed. Raises ConfigError."""
    site_key = load_site_key(files.site_key)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    tls_key = load_tls_key(files.key)
    signing_request = builder.sign(tls_key, hashes.SHA384())
    pem = signing_request.public_bytes(serialization.Encoding.PEM).decode()
    node_key = public_line(load_node_key(files.node_key).public_key())
    fields = dict(zip(_REQUEST_KEYS, (site, pem, node_key, public_line(site_key.public_key())), strict=True))
    signature = site_key.sign(_to_sign(fields))
    return Request(site, signing_request, tls_key.public_key(), node_key, fields["site_key"], signature)


def read_request(path: Path) -> Request:
    """Read a request file. Raises ConfigError: see :meth:`Request.parse`."""
    return Request.parse(_bytes(path), name=str(path))


@dataclass(frozen=True, slots=True)
class Invitation:
    """What the coordinator answers: the consortium's two public keys, the roster, and the site's certificate."""

    site: str
    authority: x509.Certificate
    certificate: x509.Certificate
    signing_key: Ed25519PublicKey
    roster: Signed

    @property
    def fingerprint(self) -> str:
        """The consortium's, to compare by telephone before anything of the invitation is believed."""
        return consortium_fingerprint(self.authority, self.signing_key)

    def to_bytes(self) -> bytes:
        """As JSON."""
        pem = serialization.Encoding.PEM
        fields = {
            "site": self.site,
            "authority": self.authority.public_bytes(pem).decode(),
            "certificate": self.certificate.public_bytes(pem).decode(),
            "signing_key": public_line(self.signing_key),
            "roster": self.roster.to_bytes().decode(),
        }
        return json.dumps({"medfl_invitation": _VERSION, **fields}, indent=1).encode() + b"\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an invitation file. Raises ConfigError when it is none."""
        raw = _bytes(path)
        try:
            fields = _read(raw, "medfl_invitation", _INVITATION_KEYS, _MAX_INVITATION_BYTES)
            return cls(
                fields["site"],
                parse_certificate(fields["authority"].encode(), str(path)),
                parse_certificate(fields["certificate"].encode(), str(path)),
                parse_signing_key(fields["signing_key"]),
                Signed.parse(fields["roster"].encode()),
            )
        except (ConfigError, ProtocolError, ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(
                f"{path}: is not an invitation: the coordinator makes one with medfl-server approve"
            ) from None

    def check(self, own: Request) -> Membership:
        """The roster, once it is known that the invitation is whole and answers our ``own`` request.

        Raises:
            PolicyRefusal, ProtocolError: it was put together by somebody else, or is for other keys than ours.
        """
        membership = Membership.verified(self.roster, self.signing_key)
        if self.site != own.site or common_name(self.certificate) != own.site:
            raise PolicyRefusal(
                f"the invitation is for site {self.site}, and this is site {own.site}: ask for your own"
            )
        entry = membership.by_name.get(own.site)
        if entry is None or (entry.site_key, entry.node_key) != (own.site_key, own.node_key):
            raise PolicyRefusal(
                "the invitation's roster does not have this site under its keys: have the coordinator approve the "
                "request.json of these keys"
            )
        if not signed_by(self.certificate, self.authority) or self.certificate.public_key() != own.tls_key:
            raise PolicyRefusal("the invitation's certificate is not for this site's key, or not of its authority")
        return membership


def _read(raw: bytes, kind: str, keys: tuple[str, ...], largest: int) -> dict[str, Any]:
    if len(raw) > largest:
        raise ValueError
    fields = json.loads(raw)
    if fields[kind] != _VERSION or not all(isinstance(fields[key], str) for key in keys):
        raise ValueError
    return dict(fields)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _to_sign(fields: dict[str, str]) -> bytes:
    return _REQUEST_DOMAIN + json.dumps([fields[key] for key in _REQUEST_KEYS]).encode()
