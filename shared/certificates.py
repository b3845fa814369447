"""The consortium's own certificate authority, and the TLS certificates of its coordinator and sites.

One private authority is all that anyone trusts: a public authority's certificate opens nothing here. The common name
of a client certificate is the site's name. Hospitals make their keys themselves (:mod:`medfl.shared.enrolment`)::

    authority.pem  authority.key        the authority; its key belongs offline
    coordinator.pem  coordinator.key    the server's certificate
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from medfl.shared.errors import ConfigError
from medfl.shared.files import write_whole
from medfl.shared.keys import PUBLIC_FILE, encryption, read_private, write_new
from medfl.shared.passphrase import passphrase as the_passphrase

AUTHORITY_DAYS, LEAF_DAYS = 3650, 397
WARN_DAYS = 30
"""A certificate with fewer days left is worth a warning."""

_CLOCKS_DIFFER = datetime.timedelta(hours=1)  # certificates are valid from this long before they are made

_SITE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Authority:
    """The consortium's certificate authority, with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class SiteFiles:
    """What one site needs, and the two public keys that go into the coordinator's roster."""

    folder: Path

    @property
    def authority(self) -> Path:
        """The pinned authority's certificate."""
        return self.folder / "authority.pem"

    @property
    def certificate(self) -> Path:
        """The TLS client certificate."""
        return self.folder / "client.pem"

    @property
    def key(self) -> Path:
        """The TLS client certificate's private key."""
        return self.folder / "client.key"

    @property
    def node_key(self) -> Path:
        """The private node key (EC P-384)."""
        return self.folder / "node.key"

    @property
    def node_public_key(self) -> Path:
        """The public node key, for the roster."""
        return self.folder / "node.key.pub"

    @property
    def site_key(self) -> Path:
        """The private site key (Ed25519)."""
        return self.folder / "site.key"

    @property
    def site_public_key(self) -> Path:
        """The public site key, for the roster."""
        return self.folder / "site.key.pub"


def create_authority(
    folder: Path, *, name: str = "MedFL consortium", days: float = AUTHORITY_DAYS, passphrase: bytes | None = None
) -> Authority:
    """Make a new authority in ``folder``: ``authority.pem``, ``authority.key`` (0600). Raises ConfigError if there."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, subject, key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    certificate = builder.sign(key, hashes.SHA384())
    write_new(folder / "authority.key", private_bytes(key, passphrase))
    write_whole(folder / "authority.pem", certificate_pem(certificate), mode=PUBLIC_FILE)
    return Authority(certificate, key)


def read_authority(certificate: Path, key: Path) -> Authority:
    """The authority whose two files these are. Raises ConfigError when unreadable or not a pair."""
    authority = Authority(load_certificate(certificate), load_tls_key(key))
    if authority.certificate.public_key() != authority.key.public_key():
        raise ConfigError(f"{key}: does not belong to the authority in {certificate}")
    return authority


def issue_server_certificate(
    authority: Authority,
    folder: Path,
    hosts: Sequence[str],
    *,
    days: float = LEAF_DAYS,
    passphrase: bytes | None = None,
) -> None:
    """Write ``coordinator.pem`` and ``coordinator.key`` for ``hosts``: DNS names or IP addresses that sites dial."""
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = server_certificate(authority, key.public_key(), hosts, days=days)
    write_new(folder / "coordinator.key", private_bytes(key, passphrase))
    write_whole(folder / "coordinator.pem", certificate, mode=PUBLIC_FILE)


def server_certificate(
    authority: Authority, public_key: ec.EllipticCurvePublicKey, hosts: Sequence[str], *, days: float = LEAF_DAYS
) -> bytes:
    """The PEM certificate of a coordinator that sites dial as ``hosts``. Raises ConfigError for a malformed host."""
    alternative = _alternative_names(hosts)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "MedFL coordinator")])
    builder = _leaf(authority, subject, public_key, ExtendedKeyUsageOID.SERVER_AUTH, days)
    return certificate_pem(builder.add_extension(alternative, critical=False).sign(authority.key, hashes.SHA384()))


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """DNS names and addresses that a server's certificate is for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def revocation_list(authority: Authority, serials: Iterable[int]) -> bytes:
    """A PEM list of certificates that are no longer accepted, for as long as the authority lives."""
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now - _CLOCKS_DIFFER)
        .next_update(authority.certificate.not_valid_after_utc)
    )
    for serial in sorted(set(serials)):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - _CLOCKS_DIFFER).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(authority.key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def revoked_serials(path: Path) -> set[int]:
    """Serial numbers in the list that :func:`revocation_list` made. Raises ConfigError when it cannot be read."""
    try:
        return {entry.serial_number for entry in x509.load_pem_x509_crl(path.read_bytes())}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ConfigError(f"{path}: is not a list of revoked certificates in PEM format") from None


def issue_client_certificate(
    authority: Authority, site: str, public_key: ec.EllipticCurvePublicKey, *, days: float = LEAF_DAYS
) -> bytes:
    """The PEM certificate of ``site``; its private key stays wherever it was made.

    Raises:
        ConfigError: the site's name is malformed.
    """
    check_site_name(site)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    builder = _leaf(authority, subject, public_key, ExtendedKeyUsageOID.CLIENT_AUTH, days)
    return certificate_pem(builder.sign(authority.key, hashes.SHA384()))


def check_site_name(site: str) -> None:
    """Raises ConfigError unless ``site`` is 1 to 63 lower-case letters, digits and inner hyphens."""
    if not _SITE_NAME.fullmatch(site):
        raise ConfigError(f"site name '{site[:80]}' must be lower-case letters, digits and inner hyphens, at most 63")


def load_certificate(path: Path) -> x509.Certificate:
    """Read one PEM certificate. Raises ConfigError when missing or malformed."""
    try:
        return parse_certificate(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def parse_certificate(pem: bytes, name: str) -> x509.Certificate:
    """Parse one PEM certificate; ``name`` begins the error. Raises ConfigError when malformed."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ConfigError(f"{name}: is not a certificate in PEM format") from None


def signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether ``authority`` issued ``certificate``."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def load_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key in PEM form, of a certificate or of the authority.

    Raises:
        ConfigError: missing, readable by others, not an EC key, or its passphrase is wrong.
    """
    content = read_private(path)
    try:
        try:
            key = serialization.load_pem_private_key(content, None)
        except TypeError:  # it has a passphrase
            key = serialization.load_pem_private_key(content, the_passphrase())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(
            f"{path}: is not a private key in PEM format, or does not open with this passphrase"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: is not an EC private key")
    return key


def common_name(certificate: x509.Certificate) -> str:
    """The certificate's name: for a client certificate, the site."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def days_left(certificate: x509.Certificate, *, now: datetime.datetime | None = None) -> float:
    """Days until ``certificate`` expires; negative when it has."""
    now = now or datetime.datetime.now(datetime.UTC)
    return (certificate.not_valid_after_utc - now).total_seconds() / 86400


def check_certificate(path: Path, *, authority: Path, now: datetime.datetime | None = None) -> float:
    """Check that the certificate in ``path`` is valid today and signed by ``authority``; return its days left.

    What the other side would say without a reason, this says in words before anything is dialled.

    Raises:
        ConfigError: expired, not yet valid, or signed by another authority.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    for file in (authority, path):
        certificate = load_certificate(file)
        if certificate.not_valid_after_utc < now:
            day = certificate.not_valid_after_utc.date()
            raise ConfigError(f"{file}: the certificate expired on {day}: have a new one issued by the coordinator")
        if certificate.not_valid_before_utc > now:
            minutes = -(-(certificate.not_valid_before_utc - now).total_seconds() // 60)
            raise ConfigError(
                f"{file}: the certificate is not valid yet: this machine's clock is {minutes:.0f} minutes or more "
                "behind; set it by NTP"
            )
    if not signed_by(certificate, load_certificate(authority)):
        raise ConfigError(f"{path}: is not signed by the authority in {authority}: have it issued again")
    return days_left(certificate, now=now)


def _leaf(
    authority: Authority,
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    purpose: x509.ObjectIdentifier,
    days: float,
) -> x509.CertificateBuilder:
    issuer = x509.SubjectKeyIdentifier.from_public_key(authority.key.public_key())
    identifier = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer)
    builder = _builder(subject, authority.certificate.subject, public_key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    return builder.add_extension(identifier, critical=False)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    start = now - _CLOCKS_DIFFER
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(start, end - datetime.timedelta(hours=1)))
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    if not hosts:
        raise ConfigError("the coordinator needs at least one host name or address that sites can dial")
    return x509.SubjectAlternativeName([_general_name(host) for host in hosts])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise ConfigError(f"host '{host[:80]}' is neither an address nor a DNS name") from None


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """``certificate`` as a PEM file."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def private_bytes(key: ec.EllipticCurvePrivateKey, passphrase: bytes | None = None) -> bytes:
    """``key`` as a PEM file, which OpenSSL reads too."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption(passphrase))
