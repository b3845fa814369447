"""What this site pinned when it joined: the consortium's name and signing key, beside its authority's certificate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from medfl.shared.errors import ConfigError
from medfl.shared.files import write_whole
from medfl.shared.keys import public_line
from medfl.shared.signing import parse_signing_key

_FILE = "consortium.json"


@dataclass(frozen=True, slots=True)
class Pin:
    """Whose signature this site believes, and nobody else's."""

    consortium: str
    key: Ed25519PublicKey

    def save(self, keys: Path) -> None:
        """Keep it in the site's folder of keys."""
        content = {"consortium": self.consortium, "signing_key": public_line(self.key)}
        write_whole(keys / _FILE, json.dumps(content, indent=1).encode())


def joined(keys: Path) -> bool:
    """Whether this site has joined a consortium."""
    return (keys / _FILE).exists()


def load_pin(keys: Path) -> Pin:
    """What :meth:`Pin.save` kept. Raises ConfigError when this site has not joined, or the file is damaged."""
    path = keys / _FILE
    try:
        content = json.loads(path.read_bytes())
        return Pin(str(content["consortium"]), parse_signing_key(content["signing_key"]))
    except FileNotFoundError:
        raise ConfigError(
            f"{keys}: this site has not joined a consortium: medfl-client --site FILE join invitation.json"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: is damaged: join again with the invitation") from None
