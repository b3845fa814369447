"""FedNova, the coordinator's half (Wang et al. 2020, https://arxiv.org/abs/2007.07481, equation 9)."""

from __future__ import annotations

from medfl.shared.algorithms.fed_nova import effective_step
from medfl.shared.weights import Flat
from medfl.strategies.rule import Memory, Turn


def fed_nova(turn: Turn, memory: Memory) -> tuple[Flat, Memory]:
    """The mean normalised update times the mean local work, which came beside it."""
    return turn.sent + effective_step(turn.mean.step, float(turn.mean.beside[0])), memory
