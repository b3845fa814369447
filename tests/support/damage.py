"""What disks, networks and tired people do to files."""

from __future__ import annotations

import random


def damage(content: bytes, rng: random.Random) -> bytes:
    """Truncated, flipped, swapped, zeroed or repeated somewhere; as often in the header as in the pixels."""
    spoilt = bytearray(content)
    end = len(spoilt) if rng.random() < 0.5 else min(len(spoilt), 4096)
    at, length = rng.randrange(end), rng.randrange(1, 64)
    match rng.randrange(6):
        case 0:
            del spoilt[at:]
        case 1:
            for _ in range(rng.randrange(1, 8)):
                spoilt[rng.randrange(end)] ^= 1 << rng.randrange(8)
        case 2:
            to = rng.randrange(end)
            spoilt[at : at + length], spoilt[to : to + length] = spoilt[to : to + length], spoilt[at : at + length]
        case 3:
            spoilt[at : at + length] = bytes(len(spoilt[at : at + length]))
        case 4:
            spoilt[at : at + 2] = spoilt[at : at + 2][::-1]
        case _:
            spoilt[at:at] = spoilt[at : at + length]
    return bytes(spoilt)
