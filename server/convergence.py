"""Whether a study has converged: its held-out score has not grown for as many rounds as the study says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from medfl.shared.metrics import headline
from medfl.shared.study import Converged


@dataclass(frozen=True, slots=True)
class Best:
    """The best held-out score so far, and the round it was reached in."""

    score: float
    round: int


class Convergence:
    """Watches the score that the study is read by (Dice, balanced accuracy). Without scores nothing converges.

    >>> watch = Convergence(Converged(rounds=2, gain=0.01))
    >>> [watch.note(n, {"dice": score}) for n, score in enumerate([0.5, 0.6, 0.605, 0.609], 1)]
    [False, False, False, True]
    """

    def __init__(self, settings: Converged | None, best: Best | None = None) -> None:
        self._settings = settings
        self.best = best
        self.reached = False

    def note(self, number: int, scores: Mapping[str, float]) -> bool:
        """Take in the held-out ``scores`` of round ``number``; whether the study has converged with it."""
        if self._settings is None or headline(scores) is None:
            return False
        self.best = self.better(number, scores) or self.best
        return self.look(number)

    def better(self, number: int, scores: Mapping[str, float]) -> Best | None:
        """The ``scores`` of round ``number`` where they are the best so far by more than the gain, else None."""
        if self._settings is None or (found := headline(scores)) is None:
            return None
        if self.best is not None and found[1] <= self.best.score + self._settings.gain:
            return None
        return Best(found[1], number)

    def look(self, number: int) -> bool:
        """Whether the study has converged, when its last scored round is ``number``."""
        if self._settings is not None and self.best is not None:
            self.reached = number - self.best.round >= self._settings.rounds
        return self.reached
