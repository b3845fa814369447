"""The ``safeguards:`` section of a study: what the coordinator does against updates that would harm the model."""

from __future__ import annotations

from pydantic import Field

from medfl.shared.config import Settings


class Safeguards(Settings):
    """Absent: nothing is limited.

    ``max_norm``: l2 norm; a longer update is shortened to it (norm bounding, Sun et al. 2019,
    https://arxiv.org/abs/1911.07963). Each site's where the coordinator sees it, else the mean of all.
    ``max_growth``: a step of the model longer than so many times the median of the last steps is shortened to that.
    ``max_fall``: when the held-out score falls by more than this below the best so far, the model, and all that is
    remembered beside it, goes back to the last round that did not.
    """

    max_norm: float | None = Field(default=None, gt=0, le=1e9)
    max_growth: float | None = Field(default=None, ge=1, le=1e6)
    max_fall: float | None = Field(default=None, gt=0, le=1)


def unguarded(
    safeguards: Safeguards, *, private: bool, secure: bool, averaged: bool, evaluate_every: int, settles: bool
) -> str | None:
    """Why a study cannot go back as ``safeguards.max_fall`` says and what can be done, or None where it can.

    ``settles``: what its sites keep moves with each counted answer.
    """
    if safeguards.max_fall is None:
        return None
    instead = "leave it out and set max_norm or max_growth"
    if private:
        return f"safeguards.max_fall needs held-out scores, which do not leave under differential privacy: {instead}"
    if secure:
        return (
            "safeguards.max_fall would ask for a second secure sum from the same model, which sites refuse since the "
            f"difference of two sums tells on single sites: {instead}"
        )
    if averaged:
        return (
            f"safeguards.max_fall does not go with rounds.average_last or average_decay: {instead}, or leave those out"
        )
    if settles and evaluate_every > 1:
        return "safeguards.max_fall needs rounds.evaluate_every 1 with this strategy, whose sites can go back one round"
    return None
