"""FedDC, the coordinator's half (Gao et al. 2022, https://arxiv.org/abs/2203.11751, Algorithm 1)."""

from __future__ import annotations

from medfl.shared.weights import Flat
from medfl.strategies.rule import Memory, Turn

MEAN_UPDATE = "mean-update"
"""Name of the last round's mean of the sites' own updates in the memory."""


def fed_dc(turn: Turn, memory: Memory) -> tuple[Flat, Memory]:
    """The mean of the drift-corrected models; what their own updates were on average is sent with the next one."""
    return turn.sent + turn.mean.step, {MEAN_UPDATE: turn.mean.beside}
