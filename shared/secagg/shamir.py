"""Shamir's secret sharing of 32-byte secrets over the prime 2^256 + 297 (Shamir 1979, doi:10.1145/359168.359176).

The prime is the smallest above 2^256, so that any 32 bytes are a secret; a share is 33 bytes, little endian. No
well-kept library shares 256-bit secrets in one piece (PyCryptodome's cuts them into unlinked 128-bit blocks).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from medfl.shared.errors import ProtocolError

PRIME = (1 << 256) + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, points: Sequence[int]) -> list[bytes]:
    """One share for each of ``points``; any ``threshold`` of them give the secret back, fewer nothing at all.

    Args:
        secret: 32 bytes.
        threshold: 1 to ``len(points)``.
        points: distinct, 1 to 65535.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= len(points):
        raise ValueError("a secret has 32 bytes, and a threshold lies between 1 and the number of shares")
    coefficients = [int.from_bytes(secret, "little")] + [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    return evaluate(coefficients, points)


def evaluate(coefficients: Sequence[int], points: Sequence[int]) -> list[bytes]:
    """The polynomial's values (constant term first) at ``points``, as shares."""
    falling = coefficients[::-1]
    shares = []
    for x in points:
        y = 0
        for coefficient in falling:  # reduced once at the end: x is small, so y grows by 16 bits a step only
            y = y * x + coefficient
        shares.append((y % PRIME).to_bytes(SHARE_BYTES, "little"))
    return shares


def weights_at_zero(points: Sequence[int]) -> list[int]:
    """Lagrange weights: the secret is the sum of weight times share over these ``points`` (distinct, not 0)."""
    weights = []
    for x in points:
        above = below = 1
        for other in points:
            if other != x:
                above *= other
                below *= other - x
        weights.append(above % PRIME * pow(below, -1, PRIME) % PRIME)
    return weights


def join(weights: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The secret of ``shares``, given the :func:`weights_at_zero` of their points.

    Raises:
        ProtocolError: the shares do not come from a 32-byte secret.
    """
    value = sum(w * int.from_bytes(share, "little") for w, share in zip(weights, shares, strict=True)) % PRIME
    if value >> 256:
        raise ProtocolError("shares do not belong together", reason="bad shares")
    return value.to_bytes(SECRET_BYTES, "little")
