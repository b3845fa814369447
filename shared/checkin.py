"""What a site and the coordinator tell each other every few seconds beside all studies: rosters, certificates, clocks.

A question is signed with the site key, so that no site speaks for another. Of an answer, a roster carries the
consortium's signature and a certificate the authority's: nothing in it is believed because it came.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medfl.shared.enrolment import Request
from medfl.shared.errors import ProtocolError
from medfl.shared.signing import LARGEST_DOCUMENT, Signed

PATH = "/v1/fleet/check-in"
_VERSION = 1
_DOMAIN = b"MedFL check-in, version 1\0"
LARGEST_QUESTION = LARGEST_DOCUMENT + 64 * 1024


@dataclass(frozen=True, slots=True)
class CheckIn:
    """Site to coordinator: which rosters are known and in force here, and what this site asks for."""

    site: str
    in_force: int  # epoch, 0 while none is
    newest: int  # epoch, 0 while none is known
    fingerprint: str  # of the newest
    time: float  # of this machine, Unix seconds
    renew: Request | None = None  # a new certificate for the same key
    roster: Signed | None = None  # the newest, for a coordinator that was restored from an old backup
    working_on: str = ""  # digest of the study that is being trained here

    def signed(self, key: Ed25519PrivateKey) -> bytes:
        """As bytes, signed with the site key."""
        content = json.dumps(
            {
                "version": _VERSION,
                "site": self.site,
                "in_force": self.in_force,
                "newest": self.newest,
                "fingerprint": self.fingerprint,
                "time": self.time,
                "renew": _text(None if self.renew is None else self.renew.to_bytes()),
                "roster": _text(None if self.roster is None else self.roster.to_bytes()),
                "working_on": self.working_on,
            }
        ).encode()
        signature = key.sign(_DOMAIN + content)
        return base64.b64encode(signature) + b"\n" + content

    @classmethod
    def parse(cls, raw: bytes) -> tuple[CheckIn, bytes, bytes]:
        """The claim, its signature and what it is over: believe it after :func:`verify`. Raises ProtocolError."""
        try:
            if len(raw) > LARGEST_QUESTION:
                raise ValueError
            encoded, content = raw.split(b"\n", 1)
            signature = base64.b64decode(encoded, validate=True)
            fields = json.loads(content)
            if fields["version"] != _VERSION:
                raise ValueError
            claim = cls(
                _typed(fields, "site", str),
                _typed(fields, "in_force", int),
                _typed(fields, "newest", int),
                _typed(fields, "fingerprint", str),
                float(_typed(fields, "time", (int, float))),
                None if fields["renew"] is None else Request.parse(_typed(fields, "renew", str).encode()),
                None if fields["roster"] is None else Signed.parse(_typed(fields, "roster", str).encode()),
                _typed({"working_on": ""} | fields, "working_on", str),  # older sites do not say
            )
        except ProtocolError:
            raise
        except Exception:  # whatever foreign bytes make the parsers raise
            raise ProtocolError("a check-in is malformed") from None
        return claim, signature, content


def verify(key: Ed25519PublicKey, signature: bytes, content: bytes) -> None:
    """Raises ProtocolError unless a site key ``key`` signed the check-in ``content``."""
    try:
        key.verify(signature, _DOMAIN + content)
    except InvalidSignature:
        raise ProtocolError("a check-in is not signed with the site's key") from None


@dataclass(frozen=True, slots=True)
class CheckedIn:
    """Coordinator to site: the newest roster where the site lacks it, a renewed certificate, the time here, and whether
    the study that the site works on is over.
    """

    time: float
    roster: Signed | None = None
    certificate: bytes = b""  # PEM
    send_roster: bool = False  # the site knows a later roster than this coordinator
    over: bool = False

    def to_bytes(self) -> bytes:
        """As JSON."""
        fields = {
            "version": _VERSION,
            "time": self.time,
            "roster": _text(None if self.roster is None else self.roster.to_bytes()),
            "certificate": self.certificate.decode(),
            "send_roster": self.send_roster,
            "over": self.over,
        }
        return json.dumps(fields).encode()

    @classmethod
    def parse(cls, raw: bytes) -> CheckedIn:
        """Raises ProtocolError when malformed."""
        try:
            fields = json.loads(raw)
            if fields["version"] != _VERSION:
                raise ValueError
            roster = None if fields["roster"] is None else Signed.parse(_typed(fields, "roster", str).encode())
            return cls(
                float(_typed(fields, "time", (int, float))),
                roster,
                _typed(fields, "certificate", str).encode(),
                _typed(fields, "send_roster", bool),
                _typed({"over": False} | fields, "over", bool),  # older coordinators do not say
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, binascii.Error):
            raise ProtocolError("the coordinator's answer to a check-in is malformed") from None


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode()


def _typed(fields: dict[str, Any], key: str, kind: Any) -> Any:
    value = fields[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(key)
    return value
