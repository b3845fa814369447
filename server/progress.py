"""How far a study is: rounds, sites, scores, time left, refusals; from its folder, and live while it runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from medfl.server.reporter import RoundReport, Silent
from medfl.server.studies import Entry, State
from medfl.shared.config import Settings
from medfl.shared.metrics import headline
from medfl.shared.study import Study

_LAST = 5  # rounds, of whose mean duration the time left is told


class Live(Silent):
    """What the running study is doing now; told from its thread, read from others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self.doing = ""
        self.sites: dict[str, str] = {}
        self.refusals: dict[str, str] = {}

    def started(self, study: Study, next_round: int) -> None:
        """Forget the study before."""
        with self._lock:
            self._clear()

    def waiting(
        self, online: Sequence[str], taking_part: Sequence[str], needed: int, refusals: Mapping[str, str]
    ) -> None:
        """Sites are awaited."""
        with self._lock:
            self.doing = f"waiting for sites: {len(taking_part)} of {needed} take part"
            self.refusals = dict(refusals)
            self.sites = {name: "ready" if name in taking_part else "considers it" for name in online}

    def gathered(self, refusals: Mapping[str, str]) -> None:
        """A round begins; who refused before and takes part now has its refusal forgotten."""
        with self._lock:
            self.refusals = dict(refusals)

    def stage(self, round_number: int, stage: str, answered: Sequence[str], of: Sequence[str]) -> None:
        """A stage began, or another site answered."""
        with self._lock:
            self.doing = f"round {round_number}, {stage}: {len(answered)} of {len(of)} sites have answered"
            self.sites |= {name: "done" if name in answered else stage for name in of}

    def finished_round(self, report: RoundReport) -> None:
        """Note how each site fared."""
        with self._lock:
            self.sites |= {name: str(result) for name, result in report.outcomes.items()}

    def ended(self, reason: str) -> None:
        """Nothing runs any more."""
        with self._lock:
            self._clear()

    def read(self) -> tuple[str, dict[str, str], dict[str, str]]:
        """What is done, each site's state, and each refusal, of one moment."""
        with self._lock:
            return self.doing, dict(self.sites), dict(self.refusals)


class Progress(Settings):
    """One study for a person or a program."""

    study: str
    digest: str
    number: int
    state: State
    reason: str = ""
    round: int
    rounds: int
    submitted: str
    folder: str
    doing: str = ""
    seconds_left: float | None = None
    score: str = ""  # "dice 0.812": held-out, over all sites that release it
    loss: float | None = None
    sites: dict[str, str] = Field(default_factory=dict)
    site_scores: dict[str, str] = Field(default_factory=dict)
    refusals: dict[str, str] = Field(default_factory=dict)
    model: str = ""  # digest of the weights of the finished model


def run_folder(runs: Path, study: Study) -> Path:
    """Where a study leaves its model, metrics, checkpoints and logs."""
    return runs / f"{study.name}-{study.digest[:8]}"


def begin_folder(runs: Path, study: Study) -> Path:
    """The folder of a study that begins or goes on: how it was stopped before is not how it ended."""
    folder = run_folder(runs, study)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ending.json").unlink(missing_ok=True)
    return folder


def progress_of(entry: Entry, runs: Path, live: Live | None = None) -> Progress:
    """How far ``entry`` is, by its folder below ``runs``, and by ``live`` where it is the study that runs."""
    study, record, folder = entry.study, entry.record, run_folder(runs, entry.study)
    rows = _rows(folder / "metrics.jsonl")
    last = rows[-1] if rows else {}
    done = max(record.round, int(last.get("round", 0)))
    doing, sites, refusals = ("", {}, {}) if live is None else live.read()
    seconds = [float(row["seconds"]) for row in rows[-_LAST:]]
    runs_now = record.state is State.RUNNING
    return Progress(
        study=study.name,
        digest=study.digest,
        number=record.number,
        state=record.state,
        reason=record.reason,
        round=done,
        rounds=study.rounds.count,
        submitted=record.submitted.isoformat(timespec="seconds"),
        folder=str(folder),
        doing=doing,
        seconds_left=sum(seconds) / len(seconds) * (study.rounds.count - done) if seconds and runs_now else None,
        score=_score(last.get("scores", {})),
        loss=last.get("training", {}).get("loss"),
        sites=sites or {name: str(result) for name, result in last.get("outcomes", {}).items()},
        site_scores={name: _score(scores) for name, scores in last.get("site_scores", {}).items()},
        refusals=refusals,
        model=str(_ending(folder).get("model") or ""),
    )


def _score(scores: Mapping[str, float]) -> str:
    found = headline(scores)
    return "" if found is None else f"{found[0]} {found[1]:.3f}"


def _rows(path: Path) -> list[dict[str, Any]]:
    """Whole rows of a metrics file that may grow meanwhile."""
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError):
        return []


def _ending(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "ending.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
