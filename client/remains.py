"""What a site has given to a study, and what remains of it elsewhere: what withdrawing cannot take back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Remains:
    """Of one study: the rounds that this site trained, the models it received since, and what its patients spent."""

    rounds: tuple[int, ...]
    models: tuple[tuple[int, str], ...]  # last round in each, digest of its weights; oldest first
    epsilon: float | None = None  # of the study, where it is differentially private

    def lines(self) -> list[str]:
        """For a person: what cannot be taken back, and whom to ask for what."""
        if not self.rounds:
            return ["This site has trained no round of it: nothing of its patients is in any of its models."]
        said = [
            f"This site trained {len(self.rounds)} of its rounds ({_spans(self.rounds)}). What it sent then is part of "
            "every later model, and cannot be taken out again: only training anew without this site does that.",
        ]
        if self.epsilon is not None:
            said.append(
                f"What those models can tell of one patient is bounded by epsilon {self.epsilon:.3g}: that bound stays."
            )
        if self.models:
            number, digest = self.models[-1]
            said.append(
                f"The coordinator, and every site that took part, has {len(self.models)} models made with it; the last "
                f"that came here is the one after round {number}, with the digest {digest}."
            )
        said.append("Whoever should stop using them has to be asked: the coordinator first, with these digests.")
        return said


def remains_of(state: Path, digest: str) -> Remains:
    """What the site's own records say of the study with ``digest``."""
    trained: set[int] = set()
    models: dict[str, int] = {}
    epsilon: float | None = None
    for row in _rows(state / "studies" / digest / "metrics.jsonl"):
        number, model = int(row["round"]), row.get("model")
        if row.get("set") == "train":
            trained.add(number)
            epsilon = row.get("epsilon", epsilon)
        made_of = number - (row.get("set") == "train")  # the model a round begins from is the one after the last
        if isinstance(model, str) and trained and made_of >= min(trained):
            models.setdefault(model, made_of)
    ordered = sorted(((number, model) for model, number in models.items()))
    return Remains(tuple(sorted(trained)), tuple(ordered), epsilon)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Whole rows of a metrics file; none where it does not exist. A row that a crash tore is passed over."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("round"), int):
            yield row


def _spans(rounds: tuple[int, ...]) -> str:
    """Numbers in order, with hyphens.

    >>> _spans((1, 2, 3, 5, 7, 8))
    '1-3, 5, 7-8'
    """
    spans: list[list[int]] = []
    for number in rounds:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
