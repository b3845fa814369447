"""How a study ended, and the model it ended with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from medfl.shared.weights import Flat, Layout


class Ending(StrEnum):
    """Why a study ended."""

    DONE = "done"
    CONVERGED = "converged"
    STOPPED = "stopped"
    BUDGET_SPENT = "the privacy budget of too many sites is spent"
    NO_QUORUM = "too few sites took part"
    VOID_ROUNDS = "too many rounds in a row without enough answers"


@dataclass(frozen=True)
class Result:
    """The model a study ended with. ``round`` is the last complete round (0: none), ``of_round`` the model's own."""

    ending: Ending
    round: int
    weights: Flat
    layout: Layout
    of_round: int
