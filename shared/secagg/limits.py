"""How many sites a secure sum needs, and how many of them may vanish: numbers that every party recomputes."""

from __future__ import annotations

SMALLEST_COHORT = 3
"""Two sites are always refused: each would learn the other's update from the sum."""

LARGEST_COHORT = 128
"""The encoding keeps room for the rounding of so many terms."""


def threshold_of(cohort: int) -> int:
    """Least number of sites that must agree on the survivors and reveal shares: more than two thirds.

    Two different survivor sets would then need a third of the sites to sign both.

    >>> [threshold_of(n) for n in (3, 4, 7, 10, 16, 100)]
    [3, 3, 5, 7, 11, 67]
    """
    return 2 * cohort // 3 + 1


def default_minimum_cohort(roster: int) -> int:
    """Smallest cohort for a roster of so many sites, unless the roster says otherwise.

    >>> [default_minimum_cohort(n) for n in (3, 4, 5, 9, 16, 300)]
    [3, 3, 4, 5, 8, 128]
    """
    return SMALLEST_COHORT if roster <= 4 else min(LARGEST_COHORT, max(4, -(-roster // 2)))
