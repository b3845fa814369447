"""q-FedAvg: sites with a larger loss weigh more (Li et al. 2020, https://arxiv.org/abs/1905.10497, Algorithm 2).

Flower's own divides by a Lipschitz constant of weights that travel in float32; here it is one over the learning rate
and acts on updates, which keep their digits.
"""

from __future__ import annotations

import numpy as np

from medfl.shared.errors import ProtocolError
from medfl.shared.weights import Flat
from medfl.strategies.rule import Memory, Rule, Turn

_TINY = 1e-10


def q_fed_avg(*, q: float, learning_rate: float) -> Rule:
    """With ``q`` 0, the plain mean over sites; the larger ``q``, the more the worst site counts."""
    lipschitz = 1 / learning_rate

    def rule(turn: Turn, memory: Memory) -> tuple[Flat, Memory]:
        step, total = np.zeros(turn.sent.size), 0.0
        for update in turn.updates:
            if not np.isfinite(update.loss):
                raise ProtocolError("strategy qfedavg needs every site's training loss, and one keeps it: use fedavg")
            loss = max(update.loss, 0.0) + _TINY
            gradient = lipschitz * update.step.astype(np.float64)
            step += loss**q * gradient
            total += q * loss ** (q - 1) * float(gradient @ gradient) + lipschitz * loss**q
        return np.asarray(turn.sent + step / total, np.float32), memory

    return rule
