"""A round from its masked input to its end, as the journal keeps it: a restarted site goes on from here."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from medfl.client.secagg.confirm_survivors import Confirmed
from medfl.client.secagg.masked_input import Masked
from medfl.shared.secagg.announcement import Announcement


@dataclass(frozen=True, slots=True)
class OpenRound:
    """``survivors`` is set once confirmed, ``reveal`` once unmasked; the shares are gone by then."""

    masked: Masked
    survivors: tuple[int, ...] | None = None
    reveal: bytes | None = None

    @property
    def confirmed(self) -> Confirmed | None:
        """The state after phase 4, or None before it."""
        return None if self.survivors is None else Confirmed(self.masked, self.survivors)

    def revealed(self, reveal: bytes) -> OpenRound:
        """The end of the round: the answer that may be sent again, and no secret any more."""
        return OpenRound(replace(self.masked, shares={}), self.survivors, reveal)

    def to_bytes(self) -> bytes:
        """For the journal, which encrypts it."""
        masked = self.masked
        content = {
            "announcement": masked.announcement.to_bytes().hex(),
            "key_list": masked.key_list.hex(),
            "must_survive": sorted(masked.must_survive),
            "contribution": masked.contribution.hex(),
            "shares": [[site, key.hex(), seed.hex()] for site, (key, seed) in masked.shares.items()],
            "survivors": self.survivors,
            "reveal": None if self.reveal is None else self.reveal.hex(),
        }
        return json.dumps(content).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> OpenRound:
        """Read back what :meth:`to_bytes` wrote; the journal has authenticated it."""
        content = json.loads(data)
        masked = Masked(
            announcement=Announcement.parse(bytes.fromhex(content["announcement"])),
            key_list=bytes.fromhex(content["key_list"]),
            must_survive=frozenset(content["must_survive"]),
            contribution=bytes.fromhex(content["contribution"]),
            shares={site: (bytes.fromhex(key), bytes.fromhex(seed)) for site, key, seed in content["shares"]},
        )
        survivors, reveal = content["survivors"], content["reveal"]
        return cls(
            masked, None if survivors is None else tuple(survivors), None if reveal is None else bytes.fromhex(reveal)
        )
