"""SCAFFOLD, the coordinator's half (Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378, Algorithm 1)."""

from __future__ import annotations

import numpy as np

from medfl.shared.algorithms.scaffold import next_shared
from medfl.shared.weights import Flat
from medfl.strategies.rule import Memory, Rule, Turn

CONTROL = "control"
"""Name of the consortium's control variate in the memory."""


def scaffold(*, learning_rate: float) -> Rule:
    """The model moves by ``learning_rate`` times the mean update, the control variate by its mean change."""

    def rule(turn: Turn, memory: Memory) -> tuple[Flat, Memory]:
        control = memory.get(CONTROL, np.zeros_like(turn.sent))
        model = turn.sent + np.float32(learning_rate) * turn.mean.step
        return model, {CONTROL: next_shared(control, turn.mean.beside, share=turn.share)}

    return rule
