"""What the round loop tells as it goes: to a person, to a log, to metrics.jsonl."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Protocol

from medfl.shared.files import append_whole, write_whole
from medfl.shared.study import Study

log = logging.getLogger("medfl.server")


@dataclass(frozen=True)
class RoundReport:
    """One finished round. Scores of single sites are here only where the site released them."""

    round: int
    seconds: float
    outcomes: Mapping[str, str]  # site -> "trained", "refused: ...", "no answer" ...
    training: Mapping[str, float]  # scores over all released training tallies
    scores: Mapping[str, float] = field(default_factory=dict)  # held-out, over all sites
    site_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    received_bytes: int = 0
    note: str = ""  # what the safeguards did


class Reporter(Protocol):
    """Listens to a study. Methods return at once; they never raise."""

    def started(self, study: Study, next_round: int) -> None:
        """The study begins, or goes on, with ``next_round``."""
        ...

    def waiting(
        self, online: Sequence[str], taking_part: Sequence[str], needed: int, refusals: Mapping[str, str]
    ) -> None:
        """Sites are awaited; ``refusals`` says why some that were asked do not take part."""
        ...

    def gathered(self, refusals: Mapping[str, str]) -> None:
        """There are enough sites for a round, without those in ``refusals``."""
        ...

    def stage(self, round_number: int, stage: str, answered: Sequence[str], of: Sequence[str]) -> None:
        """A stage began, or another site answered."""
        ...

    def finished_round(self, report: RoundReport) -> None:
        """A round is complete and durable."""
        ...

    def ended(self, reason: str) -> None:
        """The study ended."""
        ...


class Silent:
    """A reporter that says nothing; base of those that say a little."""

    def started(self, study: Study, next_round: int) -> None:
        """Nothing."""

    def waiting(
        self, online: Sequence[str], taking_part: Sequence[str], needed: int, refusals: Mapping[str, str]
    ) -> None:
        """Nothing."""

    def gathered(self, refusals: Mapping[str, str]) -> None:
        """Nothing."""

    def stage(self, round_number: int, stage: str, answered: Sequence[str], of: Sequence[str]) -> None:
        """Nothing."""

    def finished_round(self, report: RoundReport) -> None:
        """Nothing."""

    def ended(self, reason: str) -> None:
        """Nothing."""


class MetricsFile(Silent):
    """Appends each round to ``metrics.jsonl``; rounds after a restart's checkpoint replace what the crash left."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: list[str] = []  # rows that a full disk did not take yet

    def started(self, study: Study, next_round: int) -> None:
        """Drop rows of rounds that will be run again."""
        if self._path.exists():
            rows = self._path.read_text("utf-8").splitlines(keepends=True)
            kept = [row for row in rows if row.endswith("\n") and _round_of(row) < next_round]
            if kept != rows:
                write_whole(self._path, "".join(kept).encode(), mode=0o644)

    def finished_round(self, report: RoundReport) -> None:
        """Append one row."""
        row = {
            "round": report.round,
            "seconds": round(report.seconds, 3),
            "outcomes": dict(report.outcomes),
            "training": dict(report.training),
            "scores": dict(report.scores),
            "site_scores": {site: dict(scores) for site, scores in report.site_scores.items()},
            "received_bytes": report.received_bytes,
        } | ({"note": report.note} if report.note else {})
        self._unwritten.append(json.dumps(row) + "\n")
        try:
            append_whole(self._path, "".join(self._unwritten).encode())
            self._unwritten.clear()
        except OSError as error:
            log.warning("%s cannot be written (%s): free space; its rows are kept until then", self._path, error)


def _round_of(row: str) -> float:
    """The round of a line; beyond all rounds for what a crash left."""
    try:
        return int(json.loads(row)["round"])
    except (ValueError, TypeError, KeyError):
        return inf


class Several:
    """Tells several reporters."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def started(self, study: Study, next_round: int) -> None:
        """Tell all."""
        for reporter in self._reporters:
            reporter.started(study, next_round)

    def waiting(
        self, online: Sequence[str], taking_part: Sequence[str], needed: int, refusals: Mapping[str, str]
    ) -> None:
        """Tell all."""
        for reporter in self._reporters:
            reporter.waiting(online, taking_part, needed, refusals)

    def gathered(self, refusals: Mapping[str, str]) -> None:
        """Tell all."""
        for reporter in self._reporters:
            reporter.gathered(refusals)

    def stage(self, round_number: int, stage: str, answered: Sequence[str], of: Sequence[str]) -> None:
        """Tell all."""
        for reporter in self._reporters:
            reporter.stage(round_number, stage, answered, of)

    def finished_round(self, report: RoundReport) -> None:
        """Tell all."""
        for reporter in self._reporters:
            reporter.finished_round(report)

    def ended(self, reason: str) -> None:
        """Tell all."""
        for reporter in self._reporters:
            reporter.ended(reason)
