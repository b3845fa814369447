"""What a site holds ready for a secure sum: its update, its numbers, its weight, and the model they belong to."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.poly1305 import Poly1305

from medfl.shared.secagg.announcement import Purpose
from medfl.shared.secagg.encoding import Encoded, Encoding, encode
from medfl.shared.secagg.hashing import tagged_hash
from medfl.shared.weights import Flat

NO_VECTOR: Flat = np.empty(0, np.float32)
NO_MODEL = bytes(32)
"""Model digest of a sum that starts from no model (:attr:`Purpose.SETUP`)."""


@dataclass(frozen=True)
class Contribution:
    """One site's input, kept in memory until the next one of the same study and purpose takes its place.

    ``vector`` is float32 with ``encoding.length`` values and is not changed; ``weight`` is the site's planned or
    banded number of patients; ``scalars`` has the names of ``encoding.scalars``. ``training`` and ``sent`` are what was
    asked: the study's round, and the digest of the whole vector that came with it. Sites that were asked different
    things are never in one sum: one of them could be told from the others.
    """

    study: bytes  # digest
    purpose: Purpose
    model: bytes  # digest of the weights the update starts from
    encoding: Encoding
    weight: int
    vector: Flat = field(default_factory=lambda: NO_VECTOR)
    scalars: Mapping[str, float] = field(default_factory=dict)
    training: int = 0
    sent: bytes = NO_MODEL

    def fingerprint(self, key: bytes) -> bytes:
        """Tells the same numbers from retrained ones, to whoever has ``key`` (32 secret bytes).

        32 bytes of the numbers, and 32 of how they are encoded. In another encoding they are the same numbers.
        A keyed polynomial instead of a hash: a quarter of the time, and collisions can be found only with the key.
        """
        numbers = json.dumps([self.weight, sorted(self.scalars.items())]).encode()
        vector = np.ascontiguousarray(self.vector).view(np.uint8).data
        return tagged_hash(b"contribution", numbers, Poly1305.generate_tag(key, vector)) + self.encoding.digest

    def encode(self) -> Encoded:
        """The numbers as integers. Raises TrainingError when one is not finite, ProtocolError when they do not fit."""
        return encode(
            self.vector,
            self.encoding,
            weight=self.weight,
            scalars=self.scalars,
            rounding_key=secrets.token_bytes(32) if self.encoding.stochastic else b"",
        )
