"""FedBuff, the coordinator's half (Nguyen et al. 2022, https://arxiv.org/abs/2106.06639, Algorithm 1)."""

from __future__ import annotations

import numpy as np

from medfl.shared.weights import Flat
from medfl.strategies.rule import Memory, Rule, Turn


def fed_buff(*, learning_rate: float) -> Rule:
    """The newest model moves by ``learning_rate`` times the buffered mean, whose updates are already weighed by age."""

    def rule(turn: Turn, memory: Memory) -> tuple[Flat, Memory]:
        return turn.sent + np.float32(learning_rate) * turn.mean.step, memory

    return rule
