"""The coordinator's own copy of the consortium: every epoch's signed roster, one file each, the newest in force."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medfl.server.config import ConsortiumSettings
from medfl.shared.consortium import Membership
from medfl.shared.errors import ConfigError, ProtocolError
from medfl.shared.files import write_whole
from medfl.shared.keys import PUBLIC_FILE, write_new
from medfl.shared.secagg.roster import Roster
from medfl.shared.signing import SignatureRefused, Signed, load_signing_public_key


class RosterFolder:
    """``EPOCH.json`` for every epoch. Written by commands, watched by the running coordinator."""

    def __init__(self, folder: Path, key: Ed25519PublicKey) -> None:
        self.folder = folder
        self._key = key
        self._read = cache(self._read_once)

    @classmethod
    def of(cls, settings: ConsortiumSettings) -> RosterFolder:
        """The folder of a consortium. Raises ConfigError when its public signing key cannot be read."""
        public = settings.trust.signing_key.with_name(f"{settings.trust.signing_key.name}.pub")
        return cls(settings.trust.roster, load_signing_public_key(public))

    @property
    def newest_epoch(self) -> int:
        """The epoch in force. Raises ConfigError when there is none."""
        epochs = [int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdigit()]
        if not epochs:
            raise ConfigError(f"{self.folder}: holds no roster: restore the consortium's folder from its backup")
        return max(epochs)

    def newest(self) -> Membership:
        """The roster in force. Raises ConfigError when there is none, or it was not signed here."""
        return self._read(self.newest_epoch)[1]

    def newest_signed(self) -> Signed:
        """The same with its signature, as sites get it. Raises ConfigError."""
        return self._read(self.newest_epoch)[0]

    def at(self, epoch: int) -> Membership | None:
        """The roster of ``epoch``, or None where there is none. Raises ConfigError when it was not signed here."""
        return self._read(epoch)[1] if (self.folder / f"{epoch}.json").exists() else None

    def with_digest(self, digest: bytes) -> Roster | None:
        """The roster of any epoch that a secure sum was begun with. Raises ConfigError."""
        for path in self.folder.glob("*.json"):
            if path.stem.isdigit() and (roster := self._read(int(path.stem))[1].roster).digest == digest:
                return roster
        return None

    def add(self, signed: Signed) -> Membership:
        """Put a later roster in force.

        Raises:
            SignatureRefused, ProtocolError: it is not one of ours. ConfigError: its epoch is not later than the last.
        """
        membership = Membership.verified(signed, self._key)
        if any(self.folder.glob("*.json")) and membership.epoch <= self.newest_epoch:
            raise ConfigError(f"the roster of epoch {self.newest_epoch} is in force already: somebody was faster")
        write_new(self.folder / f"{membership.epoch}.json", signed.to_bytes(), mode=PUBLIC_FILE)
        return membership

    def replace(self, signed: Signed) -> None:
        """As :meth:`add` does, over a file of the same epoch: for a coordinator that is restored from an old backup."""
        membership = Membership.verified(signed, self._key)
        write_whole(self.folder / f"{membership.epoch}.json", signed.to_bytes(), mode=PUBLIC_FILE)

    def _read_once(self, epoch: int) -> tuple[Signed, Membership]:
        path = self.folder / f"{epoch}.json"
        try:
            signed = Signed.parse(path.read_bytes())
            return signed, Membership.verified(signed, self._key)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        except (ProtocolError, SignatureRefused):
            raise ConfigError(f"{path}: is not a roster that this consortium signed: restore it from backup") from None
