"""The consortium's signature: what it stands under (rosters, studies, receipts), how it is made, checked and pinned.

One Ed25519 key, made by ``medfl-server init``, signs every document of a consortium. A signature covers the document's
kind and its exact bytes, so that no document can pass for one of another kind. A site verifies with the key that it
pinned when it joined, and never with a key that comes along with a document.
"""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medfl.shared.errors import ConfigError, PolicyRefusal, ProtocolError
from medfl.shared.keys import create_site_key, load_site_key, read_public_key

SIGNING_KEY = "signing.key"
"""The private half's file name in the consortium's folder; ``signing.key.pub`` is the public one."""

_DOMAIN = b"MedFL signed document, version 1\0"
_VERSION = 1
LARGEST_DOCUMENT = 4 * 1024 * 1024  # bytes


class Document(StrEnum):
    """What a signature can stand under."""

    ROSTER = "roster"
    STUDY = "study"
    RECEIPT = "receipt"  # for the head of a site's audit log


class SignatureRefused(PolicyRefusal):
    """A document is not signed with the key pinned here: it was forged, altered, or belongs to another consortium."""

    def __init__(self, document: Document) -> None:
        super().__init__(
            f"the {document.value} is not signed with the consortium's key that is pinned here: it was altered or made "
            "by somebody else; nothing of it is used. If the consortium has a new key, join it again",
            reason="bad signature",
        )


@dataclass(frozen=True, slots=True)
class Signed:
    """A document with its signature; nothing is believed of it before :meth:`content`."""

    document: Document
    unverified: bytes
    signature: bytes  # 64

    def content(self, key: Ed25519PublicKey, expected: Document) -> bytes:
        """The document's bytes, once they are known to be of the ``expected`` kind and signed with ``key``.

        Raises:
            SignatureRefused: they are not.
        """
        if self.document is not expected:
            raise SignatureRefused(expected)
        try:
            key.verify(self.signature, _signed_bytes(expected, self.unverified))
        except InvalidSignature:
            raise SignatureRefused(expected) from None
        return self.unverified

    def to_bytes(self) -> bytes:
        """As JSON, for a file or a message; :meth:`parse` reads it."""
        fields = {
            "medfl_signed": _VERSION,
            "document": self.document.value,
            "content": base64.b64encode(self.unverified).decode(),
            "signature": base64.b64encode(self.signature).decode(),
        }
        return json.dumps(fields, indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, raw: bytes) -> Signed:
        """Raises ProtocolError when ``raw`` is not what :meth:`to_bytes` writes."""
        try:
            if len(raw) > LARGEST_DOCUMENT:
                raise ValueError
            fields = json.loads(raw)
            if set(fields) != {"medfl_signed", "document", "content", "signature"}:
                raise ValueError
            if fields["medfl_signed"] != _VERSION:
                raise ValueError
            content = base64.b64decode(fields["content"], validate=True)
            signature = base64.b64decode(fields["signature"], validate=True)
            return cls(Document(fields["document"]), content, signature)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ProtocolError("a signed document is malformed, or of a later release") from None


def sign(key: Ed25519PrivateKey, document: Document, content: bytes) -> Signed:
    """``content`` signed as a ``document``."""
    return Signed(document, content, key.sign(_signed_bytes(document, content)))


def create_signing_key(folder: Path, *, consortium: str, passphrase: bytes | None = None) -> Ed25519PublicKey:
    """Make the consortium's key in ``folder`` (0600). Raises ConfigError when one is there."""
    create_site_key(folder / SIGNING_KEY, comment=consortium, passphrase=passphrase)
    return load_signing_public_key(folder / f"{SIGNING_KEY}.pub")


def load_signing_key(folder: Path) -> Ed25519PrivateKey:
    """The consortium's private key, kept in ``folder``; its passphrase is asked for where it has one.

    Raises:
        ConfigError: missing, readable by others, malformed, or the passphrase is wrong or cannot be had.
    """
    return load_site_key(folder / SIGNING_KEY)


def load_signing_public_key(path: Path) -> Ed25519PublicKey:
    """A consortium's public key from its one-line file. Raises ConfigError."""
    try:
        return parse_signing_key(path.read_text("ascii"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a public key") from None


def parse_signing_key(line: str) -> Ed25519PublicKey:
    """A consortium's public key from its one line. Raises ConfigError."""
    key = read_public_key(line)
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError("the consortium's signing key is not Ed25519: ask the coordinator for a new invitation")
    return key


def _signed_bytes(document: Document, content: bytes) -> bytes:
    kind = document.value.encode()
    return _DOMAIN + struct.pack("<B", len(kind)) + kind + struct.pack("<Q", len(content)) + content
