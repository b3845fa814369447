"""The coordinator's receipt for the head of a site's audit log: who had how many rows, and which hash came last.

Signed with the consortium's key and kept on both sides. A log that was cut after that, by whomever, no longer holds the
row; and neither side can say that it never saw it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medfl.shared.chain import Head
from medfl.shared.errors import ProtocolError
from medfl.shared.signing import Document, Signed, sign

_HEXADECIMAL = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a signature of this kind says."""

    consortium: str
    site: str
    rows: int
    digest: str  # of the last row, 64 hexadecimal digits
    study: str  # digest of the one in whose course the head was seen
    round: int
    time: str  # ISO 8601, the coordinator's clock

    @property
    def head(self) -> Head:
        """Of the audit log."""
        return Head(self.rows, self.digest)

    def to_bytes(self) -> bytes:
        """The one form that is signed."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, data: bytes) -> Receipt:
        """Raises ProtocolError when malformed."""
        try:
            receipt = cls(**json.loads(data))
            texts = (receipt.consortium, receipt.site, receipt.digest, receipt.study, receipt.time)
            numbers = (receipt.rows, receipt.round)
            if not all(type(text) is str and text.isprintable() and len(text) <= 200 for text in texts):
                raise ValueError
            if not all(type(number) is int and 0 <= number < 2**32 for number in numbers):
                raise ValueError
            if len(receipt.digest) != 64 or set(receipt.digest) - _HEXADECIMAL or receipt.to_bytes() != data:
                raise ValueError
        except (ValueError, TypeError, RecursionError):
            raise ProtocolError("a receipt is malformed") from None
        return receipt


def countersign(key: Ed25519PrivateKey, receipt: Receipt) -> bytes:
    """``receipt`` with the consortium's signature, as a site keeps it."""
    return sign(key, Document.RECEIPT, receipt.to_bytes()).to_bytes()


def read_receipt(signed: bytes, key: Ed25519PublicKey) -> Receipt:
    """The receipt in ``signed``.

    Raises:
        SignatureRefused: it is not signed with ``key``. ProtocolError: malformed.
    """
    return Receipt.parse(Signed.parse(signed).content(key, Document.RECEIPT))
