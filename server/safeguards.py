"""The coordinator's safeguards at work: updates shortened, steps shortened, a model taken back when its score falls."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.server.answers import Answers
from medfl.shared.safeguards import Safeguards
from medfl.shared.weights import Flat

log = logging.getLogger("medfl.server")

_REMEMBERED = 5  # steps whose median the next one is held against


def shortened(update: Flat, safeguards: Safeguards, *, length: int, whose: str) -> Flat:
    """``update`` with its first ``length`` values, the model's, scaled down to ``max_norm`` where they are longer.

    >>> shortened(np.array([6.0, 8.0, 5.0], "f4"), Safeguards(max_norm=5.0), length=2, whose="a").tolist()
    [3.0, 4.0, 5.0]
    """
    if safeguards.max_norm is None or (norm := length_of(update[:length])) <= safeguards.max_norm:
        return update
    log.warning("the update of %s has norm %.3g: shortened to safeguards.max_norm %g", whose, norm, safeguards.max_norm)
    scaled = update.copy()
    scaled[:length] *= np.float32(safeguards.max_norm / norm)
    return scaled


def length_of(vector: Flat) -> float:
    """The l2 norm of ``vector``, summed in float64 so that a long one keeps its digits and a large one is finite."""
    return float(np.sqrt(np.einsum("i,i->", vector, vector, dtype=np.float64)))


@dataclass(frozen=True)
class Good:
    """A model that was scored and did not fall, and everything that goes with it."""

    weights: Flat
    strategy: dict[str, NDArray[np.float32]]
    answers: Answers


@dataclass
class Watch:
    """What is remembered from round to round to judge the next one; goes into the checkpoint."""

    safeguards: Safeguards
    norms: list[float] = field(default_factory=list)  # of the last steps
    best: float | None = None  # highest held-out score
    good: Good | None = None

    def step(self, sent: Flat, model: Flat) -> Flat:
        """``model``, or a shorter step from ``sent`` towards it where it grew by more than ``max_growth``."""
        if self.safeguards.max_growth is None:
            return model
        update = model - sent
        norm, usual = length_of(update), median(self.norms) if self.norms else 0.0
        limit = self.safeguards.max_growth * usual
        if usual and norm > limit:
            log.warning("the model's step of norm %.3g is shortened to %.3g by safeguards.max_growth", norm, limit)
            update *= np.float32(limit / norm)
            model, norm = sent + update, limit
        self.norms = [*self.norms, norm][-_REMEMBERED:]
        return model

    def fell(self, score: float | None) -> bool:
        """Whether a model with this held-out ``score`` is to be taken back; a better one is the new measure."""
        if self.safeguards.max_fall is None or score is None:
            return False
        if self.good is not None and self.best is not None and not score >= self.best - self.safeguards.max_fall:
            return True  # NaN is a fall too
        if score == score and (self.best is None or score > self.best):  # noqa: PLR0124 - not NaN
            self.best = score
        return False

    def state(self) -> dict[str, Any]:
        """Numbers, as JSON; the good model's arrays go beside them."""
        answers = None if self.good is None else self.good.answers.state()
        return {"norms": self.norms, "best": self.best, "answers": answers}

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The good model and its strategy's memory, by name."""
        if self.good is None:
            return {}
        return {"weights": self.good.weights} | {f"strategy.{k}": array for k, array in self.good.strategy.items()}

    def restore(self, state: Mapping[str, Any], arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """Put back what :meth:`state` and :meth:`arrays` gave."""
        self.norms, self.best = list(state.get("norms", [])), state.get("best")
        if "weights" in arrays:
            memory = {k.removeprefix("strategy."): v for k, v in arrays.items() if k != "weights"}
            self.good = Good(arrays["weights"], memory, Answers.of(state.get("answers") or {}))
