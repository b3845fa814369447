"""FedDyn, the coordinator's half (Acar et al. 2021, https://arxiv.org/abs/2111.04263, Algorithm 1)."""

from __future__ import annotations

import numpy as np

from medfl.shared.algorithms.fed_dyn import next_model
from medfl.shared.weights import Flat
from medfl.strategies.rule import Memory, Rule, Turn

MEMORY = "h"


def fed_dyn(*, alpha: float) -> Rule:
    """The mean model, corrected by the memory of all updates so far."""

    def rule(turn: Turn, memory: Memory) -> tuple[Flat, Memory]:
        before = memory.get(MEMORY, np.zeros_like(turn.sent))
        model, after = next_model(turn.sent, turn.mean.step, before, share=turn.share, alpha=alpha)
        return model, {MEMORY: after}

    return rule
