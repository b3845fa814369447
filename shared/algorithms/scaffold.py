"""SCAFFOLD, both halves' arithmetic: control variates (Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378)."""

from __future__ import annotations

import numpy as np

from medfl.shared.weights import Flat


def correction(shared: Flat, own: Flat) -> Flat:
    """What a site adds to every gradient: the consortium's control variate minus its own (Algorithm 1, line 10)."""
    return np.subtract(shared, own)


def control_change(shared: Flat, update: Flat, *, steps: int, learning_rate: float) -> Flat:
    """Change of a site's control variate after ``steps`` of SGD that gave ``update`` (option II of line 12).

    The new one is ``own - shared - update / (steps * learning_rate)``: the mean gradient along the way.

    >>> control_change(np.array([1.0], "f4"), np.array([-6.0], "f4"), steps=3, learning_rate=0.5).tolist()
    [3.0]
    """
    return np.asarray(-shared - update / np.float32(steps * learning_rate), np.float32)


def next_shared(shared: Flat, mean_change: Flat, *, share: float) -> Flat:
    """The consortium's next control variate after ``share`` of its sites, by weight, answered (line 17).

    The paper weighs sites equally. Here the objective weighs them by examples, and so must the variate: it stays the
    weighted mean of the sites' own, as far as their answers were counted, so that corrections cancel over the sites.
    """
    return np.asarray(shared + np.float32(share) * mean_change, np.float32)
