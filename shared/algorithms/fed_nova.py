"""FedNova, both halves' arithmetic: updates per unit of local work (Wang et al. 2020, https://arxiv.org/abs/2007.07481)."""

from __future__ import annotations

import numpy as np

from medfl.shared.weights import Flat

UNIT = 1000.0
"""Local work travels in thousands, so that it is of the size of a weight where it is summed under a clip."""


def local_work(steps: int, *, momentum: float) -> float:
    """The l1 norm of the coefficients with which a round's gradients enter the update (section 4.1 of the paper).

    Without momentum every gradient enters once; with it, the gradient of step j enters ``1 + m + ... + m^(steps-j)``.

    >>> local_work(3, momentum=0.0), local_work(2, momentum=0.5)
    (3.0, 2.5)
    """
    if momentum == 0:
        return float(steps)
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


def normalised(update: Flat, work: float) -> Flat:
    """``update`` per unit of local work, and after it the work itself in :data:`UNIT`."""
    return np.append(update / np.float32(work), np.float32(work / UNIT)).astype(np.float32)


def effective_step(mean: Flat, mean_work: float) -> Flat:
    """The step of the global model: mean normalised update times the mean work (equation 9)."""
    return np.asarray(mean * np.float32(mean_work * UNIT), np.float32)
