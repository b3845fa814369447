"""FedDyn, both halves' arithmetic: dynamic regularisation (Acar et al. 2021, https://arxiv.org/abs/2111.04263)."""

from __future__ import annotations

import numpy as np

from medfl.shared.weights import Flat


def next_own(own: Flat, update: Flat, *, alpha: float) -> Flat:
    """A site's next linear term: at its local optimum, the gradient of its loss (Algorithm 1).

    Training adds ``alpha * (w - w_global) - own`` to every gradient.

    >>> next_own(np.array([1.0], "f4"), np.array([-2.0], "f4"), alpha=0.5).tolist()
    [2.0]
    """
    return np.asarray(own - np.float32(alpha) * update, np.float32)


def next_model(sent: Flat, mean_update: Flat, memory: Flat, *, share: float, alpha: float) -> tuple[Flat, Flat]:
    """Global model and memory ``h`` after a round in which ``share`` of all sites moved by ``mean_update``."""
    memory = np.asarray(memory - np.float32(alpha * share) * mean_update, np.float32)
    return np.asarray(sent + mean_update - memory / np.float32(alpha), np.float32), memory
