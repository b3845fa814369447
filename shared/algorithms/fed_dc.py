"""FedDC, the site's arithmetic: drift kept apart and corrected (Gao et al. 2022, https://arxiv.org/abs/2203.11751)."""

from __future__ import annotations

import numpy as np

from medfl.shared.weights import Flat


def gradient_term(last_own: Flat, last_mean: Flat, *, steps: int, learning_rate: float) -> Flat:
    """What is added to every gradient: how the site's last update differed from all sites' mean (equation 6).

    >>> gradient_term(np.array([3.0], "f4"), np.array([1.0], "f4"), steps=4, learning_rate=0.5).tolist()
    [1.0]
    """
    return np.asarray((last_own - last_mean) / np.float32(steps * learning_rate), np.float32)


def next_drift(drift: Flat, update: Flat) -> Flat:
    """The site's drift from the global model, after a round that gave ``update`` (equation 7).

    >>> next_drift(np.array([1.0], "f4"), np.array([-3.0], "f4")).tolist()
    [-2.0]
    """
    return np.asarray(drift + update, np.float32)


def corrected(update: Flat, drift: Flat) -> Flat:
    """What the site sends in place of ``update``: its model with its (new) drift added, less the global one (line 13).

    >>> corrected(np.array([-3.0], "f4"), np.array([-2.0], "f4")).tolist()
    [-5.0]
    """
    return np.asarray(update + drift, np.float32)
