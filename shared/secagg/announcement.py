"""What a secure sum is about: the announcement that opens it, and the context hash that everything is bound to."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from medfl.shared.secagg.hashing import DIGEST_BYTES, ids_to_bytes, tagged_hash
from medfl.shared.secagg.limits import LARGEST_COHORT
from medfl.shared.secagg.rings import Ring
from medfl.shared.secagg.wire import Reader, ascending


class Purpose(IntEnum):
    """What is summed: patient numbers before the first round, updates, or scores on held-out patients."""

    SETUP = 0
    TRAIN = 1
    EVALUATE = 2


@dataclass(frozen=True, slots=True)
class Announcement:
    """Coordinator to site, first message of a secure sum. Unsigned: every site signs the context it computes of it.

    ``round`` rises for the life of the study, also over restarts and repetitions; it is not the training round.
    """

    study: bytes  # digest
    purpose: Purpose
    round: int
    attempt: int
    cohort: tuple[int, ...]  # site ids, ascending
    threshold: int
    ring: Ring
    length: int  # values in the vector
    encoding: bytes  # digest
    model: bytes  # digest of the weights that the updates start from
    roster: bytes  # digest
    training: int = 0  # round of the study that sites were asked for; 0 in SETUP
    sent: bytes = bytes(DIGEST_BYTES)  # digest of the whole vector that they were sent: the model and what is beside it

    def to_bytes(self) -> bytes:
        """The message."""
        return b"".join(self._parts()[:4]) + struct.pack("<H", len(self.cohort)) + b"".join(self._parts()[4:])

    @classmethod
    def parse(cls, data: bytes) -> Announcement:
        """Raises ProtocolError when malformed."""
        reader = Reader(data, "an announcement")
        study = reader.take(DIGEST_BYTES)
        try:
            purpose = Purpose(reader.number("B"))
        except ValueError:
            raise reader.error("names an unknown purpose") from None
        number, attempt, size = reader.number("I"), reader.number("I"), reader.number("H")
        if size > LARGEST_COHORT:
            raise reader.error("names too many sites")
        cohort = tuple(reader.number("H") for _ in range(size))
        if not ascending(cohort):
            raise reader.error("lists the cohort twice or out of order")
        threshold = reader.number("H")
        try:
            ring = Ring(reader.number("B"))
        except ValueError:
            raise reader.error("names an unknown ring") from None
        length = reader.number("Q")
        encoding, model, roster = (reader.take(DIGEST_BYTES) for _ in range(3))
        training, sent = reader.number("I"), reader.take(DIGEST_BYTES)
        reader.end()
        return cls(
            study, purpose, number, attempt, cohort, threshold, ring, length, encoding, model, roster, training, sent
        )

    def context(self) -> bytes:
        """Hash of all of the above, 32 bytes: in every key, signature and commitment of this attempt."""
        return tagged_hash(b"ctx", *self._parts())

    def _parts(self) -> tuple[bytes, ...]:
        return (
            self.study,
            struct.pack("<B", self.purpose),
            struct.pack("<I", self.round),
            struct.pack("<I", self.attempt),
            ids_to_bytes(self.cohort),
            struct.pack("<H", self.threshold),
            struct.pack("<B", self.ring),
            struct.pack("<Q", self.length),
            self.encoding,
            self.model,
            self.roster,
            struct.pack("<I", self.training),
            self.sent,
        )
