"""FedBuff: answers count as they come, old ones less (Nguyen et al. 2022, https://arxiv.org/abs/2106.06639)."""

from __future__ import annotations


def staleness_weight(behind: int, *, exponent: float) -> float:
    """What an update counts for that was trained from a model ``behind`` rounds older than the newest (section 5).

    >>> staleness_weight(0, exponent=0.5), staleness_weight(3, exponent=0.5)
    (1.0, 0.5)
    """
    return float((1 + behind) ** -exponent)
