"""TLS of the fleet port: version 1.3, certificates on both sides, the coordinator's renewed while it serves."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from medfl.shared.certificates import check_certificate, load_tls_key, revoked_serials
from medfl.shared.errors import ConfigError
from medfl.shared.passphrase import passphrase


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What is shown to sites, and which of theirs are accepted. All PEM."""

    authority: Path  # certificate of the consortium's authority
    certificate: Path
    key: Path
    revoked: Path | None = None  # certificates of the authority that are no longer accepted


class FleetTls:
    """``front`` is for the port to listen with; every connection gets the files of the last :meth:`reload`."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises ConfigError when a certificate, key or list is missing, expired, not ours, open to all, or locked."""
        self._files = files
        self._newest = _context(files)
        self.front = _context(files)
        self.front.sni_callback = self._show_the_newest

    def reload(self) -> None:
        """Let new connections see the certificate and the list of revoked ones that are on the disk now.

        Raises:
            ConfigError: they cannot be used; the ones before stay.
        """
        self._newest = _context(self._files)

    def _show_the_newest(self, connection: ssl.SSLObject, name: str | None, front: ssl.SSLContext) -> None:
        """Called at the beginning of every handshake."""
        connection.context = self._newest


def _context(files: TlsFiles) -> ssl.SSLContext:
    check_certificate(files.certificate, authority=files.authority)
    load_tls_key(files.key)  # says whether the passphrase is wrong
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(files.authority)
        context.load_cert_chain(files.certificate, files.key, password=passphrase)
    except ssl.SSLError:
        raise ConfigError(f"{files.key}: does not belong to the certificate {files.certificate}") from None
    if files.revoked is not None:
        revoked_serials(files.revoked)  # says what is wrong with the file
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        context.load_verify_locations(files.revoked)
    return context
