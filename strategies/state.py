"""What a strategy carries from round to round (server momentum and the like), as named arrays for the checkpoint."""

from __future__ import annotations

import numpy as np
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from medfl.shared.messages import TENSOR
from medfl.strategies.rule import RuleStrategy

_KEYED = ("m_t", "v_t")  # FedOpt family: one array for each tensor of the model
_LISTED = "momentum_vector"  # FedAvgM: a list in the order of the tensors


def capture(strategy: Strategy) -> dict[str, NDArray[np.float32]]:
    """Copies of the strategy's arrays; empty for a strategy without memory."""
    if isinstance(strategy, RuleStrategy):
        return {name: vector.copy() for name, vector in strategy.memory.items()}
    state = {}
    for name in _KEYED:
        if value := getattr(strategy, name, None):
            state[name] = np.array(value[TENSOR])
    if (listed := getattr(strategy, _LISTED, None)) is not None:
        state[_LISTED] = np.array(listed[0])
    return state


def restore(strategy: Strategy, state: dict[str, NDArray[np.float32]]) -> None:
    """Put back what :func:`capture` gave."""
    if isinstance(strategy, RuleStrategy):
        strategy.memory = dict(state)
        return
    for name in _KEYED:
        if name in state:
            setattr(strategy, name, {TENSOR: state[name]})
    if _LISTED in state:
        setattr(strategy, _LISTED, [state[_LISTED]])
