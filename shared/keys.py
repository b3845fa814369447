"""Who a site is: its node key (EC P-384, signs every request) and its site key (Ed25519, signs in secure aggregation).

Both are OpenSSH files, with a passphrase where the administrator wants one (:mod:`medfl.shared.passphrase`);
``ssh-keygen -lf node.key.pub`` shows the fingerprint to compare.
"""

from __future__ import annotations

import base64
import hashlib
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from medfl.shared.errors import ConfigError
from medfl.shared.files import PRIVATE_FILE, create_whole, private_folder, write_whole
from medfl.shared.passphrase import passphrase as the_passphrase

PUBLIC_FILE = 0o644

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


def create_node_key(path: Path, *, comment: str = "", passphrase: bytes | None = None) -> PublicKey:
    """Write a new node key to ``path`` (0600) and its public half to ``path.pub``.

    Raises:
        ConfigError: ``path`` exists; a key is never overwritten.
    """
    return _write_pair(path, ec.generate_private_key(ec.SECP384R1()), comment, passphrase)


def create_site_key(path: Path, *, comment: str = "", passphrase: bytes | None = None) -> PublicKey:
    """Write a new Ed25519 site key to ``path`` (0600) and its public half to ``path.pub``.

    Raises:
        ConfigError: ``path`` exists; a key is never overwritten.
    """
    return _write_pair(path, ed25519.Ed25519PrivateKey.generate(), comment, passphrase)


def complete_pair(path: Path, key: PublicKey, *, comment: str = "") -> None:
    """Write ``path.pub`` where it is missing beside the private key in ``path``, whose public half is ``key``."""
    if not _public_file(path).exists():
        _write_public(path, key, comment)


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a node key.

    Raises:
        ConfigError: unreadable, readable by others, not a P-384 key in OpenSSH format, or its passphrase is wrong.
    """
    key = _load(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{path}: is not a node key (EC P-384): make one with medfl-client ... enroll")
    return key


def load_site_key(path: Path) -> ed25519.Ed25519PrivateKey:
    """Read a site key.

    Raises:
        ConfigError: unreadable, readable by others, not an Ed25519 key in OpenSSH format, or its passphrase is wrong.
    """
    key = _load(path)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{path}: is not a site key (Ed25519): make one with medfl-client ... enroll")
    return key


def read_public_key(content: str | bytes) -> PublicKey:
    """Parse a public key in OpenSSH form (one line, with or without a comment) or PEM.

    Raises:
        ConfigError: neither EC nor Ed25519, or not a public key at all.
    """
    data = content.encode() if isinstance(content, str) else content
    pem = data.lstrip().startswith(b"-----")
    try:
        key = serialization.load_pem_public_key(data) if pem else serialization.load_ssh_public_key(data.strip())
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError("a public key is malformed: give the one line of a .pub file") from None
    if not isinstance(key, (ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey)):
        raise ConfigError("a public key is neither EC nor Ed25519: give the one line of a .pub file")
    return key


def node_public_key(content: str | bytes) -> bytes:
    """The node key's public half in the form Flower's link state compares: PEM, SubjectPublicKeyInfo.

    Raises:
        ConfigError: not a P-384 public key.
    """
    key = read_public_key(content)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError("a site's public node key is not EC P-384: give the one line of its node.key.pub")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def public_line(key: PublicKey, *, comment: str = "") -> str:
    """``key`` as the one line of a .pub file."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    return f"{line} {comment}".rstrip()


def fingerprint(key: PublicKey) -> str:
    """``SHA256:...`` as ``ssh-keygen -lf`` prints it, to be compared by telephone."""
    blob = base64.b64decode(public_line(key).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def write_new(path: Path, content: bytes, *, mode: int = PRIVATE_FILE) -> None:
    """Write ``path`` whole, and only if nothing is there.

    Raises:
        ConfigError: ``path`` exists or cannot be created.
    """
    try:
        private_folder(path.parent)
        create_whole(path, content, mode=mode)
    except FileExistsError:
        raise ConfigError(f"{path}: exists and is not overwritten: move it away to replace it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def read_private(path: Path) -> bytes:
    """Content of a file that only its owner may read.

    Raises:
        ConfigError: missing, unreadable, or readable by others.
    """
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"{path}: can be read by others: run chmod 600 on it")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def encryption(passphrase: bytes | None) -> serialization.KeySerializationEncryption:
    """How a private key is written: under ``passphrase``, or as it is."""
    return serialization.NoEncryption() if passphrase is None else serialization.BestAvailableEncryption(passphrase)


def _write_pair(path: Path, key: PrivateKey, comment: str, passphrase: bytes | None) -> PublicKey:
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, encryption(passphrase))
    public = key.public_key()
    write_new(path, private)
    _write_public(path, public, comment)
    return public


def _write_public(path: Path, key: PublicKey, comment: str) -> None:
    write_whole(_public_file(path), f"{public_line(key, comment=comment)}\n".encode(), mode=PUBLIC_FILE)


def _public_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.pub")


def _load(path: Path) -> object:
    content = read_private(path)
    try:
        return serialization.load_ssh_private_key(content, None)
    except TypeError:  # it has a passphrase
        pass
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: is not a private key in OpenSSH format") from None
    try:
        return serialization.load_ssh_private_key(content, the_passphrase())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: does not open with this passphrase") from None
