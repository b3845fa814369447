"""What an experiment found: scores by method, site and seed, with what they cost; saved and read cell by cell."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from medfl.shared.files import write_whole
from medfl.simulations.comparison import Interval, Paired, Scores, interval, paired

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ("method", "site", "seed", "score")


@dataclass(frozen=True)
class Row:
    """One method's score at one site for one seed."""

    method: str
    site: str
    seed: int
    score: float


@dataclass(frozen=True)
class Cell:
    """One method run once: its score at every site, its learning curve, its cost."""

    method: str
    seed: int
    scores: Mapping[str, float]  # by site; NaN where there is none
    kind: str = "federated"  # federated, baseline or trivial
    curve: Sequence[tuple[int, float]] = ()  # (round, headline score over all sites)
    received_bytes: int = 0  # by the coordinator, in all rounds
    seconds: float = 0.0
    epsilon: float | None = None  # promised to each unit; None without privacy
    spent: Mapping[str, Sequence[float]] = field(default_factory=dict)  # by site: epsilon after each round
    leaves: str = ""  # what leaves a site and how each is treated, of a private study
    times: Sequence[float] = ()  # when each round ended, in training times of a usual site; empty where all are alike
    # Decibels of the picture that a curious coordinator makes of a patient, and of a plain grey one.
    reconstruction: tuple[float, float] | None = None
    backdoor: float | None = None  # share of marked held-out images that are taken for the attacker's class

    def save(self, path: Path, digest: str) -> None:
        """Write it with the digest of what made it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, _as_json({"digest": digest, **asdict(self)}, indent=1), mode=0o644)

    @classmethod
    def load(cls, path: Path, digest: str) -> Cell | None:
        """The saved cell when it was made by the same settings; None otherwise, and for a damaged file."""
        try:
            content = json.loads(path.read_bytes())
            if content.pop("digest") != digest:
                return None
            content["scores"] = {site: _number(score) for site, score in content["scores"].items()}
            content["curve"] = [(number, _number(score)) for number, score in content["curve"]]
            if content["reconstruction"] is not None:
                content["reconstruction"] = tuple(content["reconstruction"])
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Experiment:
    """All scores of a simulation, and where its files lie."""

    metric: str
    cells: tuple[Cell, ...]
    folder: Path
    seconds: float
    patients: Mapping[str, int] = field(default_factory=dict)
    held_out: tuple[str, ...] = ()  # sites that did not train; they are left out of means over sites
    scored: Mapping[str, int] = field(default_factory=dict)  # held-out patients by site, on whom scores rest
    left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # images or labels by site and reason

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Every score by itself."""
        return tuple(
            Row(cell.method, site, cell.seed, score) for cell in self.cells for site, score in cell.scores.items()
        )

    @cached_property
    def measured(self) -> frozenset[tuple[str, int]]:
        """(site, seed) of which some method has a score; where no held-out patient can be scored, none has.

        What needs no network does not count where something does: it may have one without any patient.
        """
        cells = [cell for cell in self.cells if cell.kind != "trivial"] or self.cells
        return frozenset(
            (site, cell.seed) for cell in cells for site, score in cell.scores.items() if not math.isnan(score)
        )

    def mean(self, method: str, site: str) -> float:
        """Mean score over the seeds that are measured there; NaN where there is none, or the method lacks one."""
        scores = [
            r.score for r in self.rows if (r.method, r.site) == (method, site) and (site, r.seed) in self.measured
        ]
        return statistics.fmean(scores) if scores else math.nan

    def interval(self, method: str, site: str | None = None) -> Interval:
        """Mean and 95 % interval over seeds, at one site or of the mean over the sites that train.

        Every method's are over the same sites and seeds, those that are :attr:`measured`.
        """
        by_seed: dict[int, list[float]] = {}
        for row in self.rows:
            if row.method != method or (row.site, row.seed) not in self.measured:
                continue
            if row.site == site if site else row.site not in self.held_out:
                by_seed.setdefault(row.seed, []).append(row.score)
        return interval([statistics.fmean(scores) for scores in by_seed.values()])

    def compare(self, method: str, reference: str) -> Paired:
        """``method`` against ``reference`` over the same sites that train, and seeds."""
        return paired(self._scores(method), self._scores(reference))

    def _scores(self, method: str) -> Scores:
        return {
            (row.site, row.seed): row.score
            for row in self.rows
            if row.method == method and row.site not in self.held_out
        }

    @property
    def methods(self) -> list[str]:
        """All methods, in order of appearance."""
        return list(dict.fromkeys(cell.method for cell in self.cells))

    def methods_of(self, kind: str) -> list[str]:
        """Methods of one kind: federated, baseline or trivial."""
        return list(dict.fromkeys(cell.method for cell in self.cells if cell.kind == kind))

    @property
    def sites(self) -> list[str]:
        """All sites, in order of appearance."""
        return list(dict.fromkeys(row.site for row in self.rows))

    def title(self, site: str) -> str:
        """The site's name, and whether it did not train."""
        return f"{site} (held out)" if site in self.held_out else site

    def to_dataframe(self) -> pd.DataFrame:
        """The rows as a table; needs pandas (``pip install medfl[report]``)."""
        import pandas as pd

        return pd.DataFrame([(r.method, r.site, r.seed, r.score) for r in self.rows], columns=list(_COLUMNS))

    def _attacks_and_budgets(self, method: str) -> dict[str, object]:
        """What sites have spent at most, how often a backdoor works, what a curious coordinator makes: over seeds."""
        cells = [cell for cell in self.cells if cell.method == method]
        spent = [epsilons[-1] for cell in cells for epsilons in cell.spent.values() if epsilons]
        planted = [cell.backdoor for cell in cells if cell.backdoor is not None]
        made = [cell.reconstruction for cell in cells if cell.reconstruction is not None]
        found: dict[str, object] = {"epsilon": max(spent)} if spent else {}
        found |= {"backdoor": statistics.fmean(planted)} if planted else {}
        return found | ({"reconstruction_db": max(made)[0], "grey_db": max(made)[1]} if made else {})

    def save(self, *, study: str) -> None:
        """Write ``results.csv`` and ``results.json``; ``study`` is the study's digest."""
        with (self.folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows((row.method, row.site, row.seed, f"{row.score:.6f}") for row in self.rows)
        summary = {
            "study": study,
            "metric": self.metric,
            "seeds": sorted({cell.seed for cell in self.cells}),
            "patients": dict(self.patients),
            "held_out": list(self.held_out),
            "scored_patients": dict(self.scored),
            "left_out": {site: dict(reasons) for site, reasons in self.left_out.items()},
            "mean": {m: {s: self.mean(m, s) for s in self.sites} for m in self.methods},
            "received_bytes": {m: max(c.received_bytes for c in self.cells if c.method == m) for m in self.methods},
            "attacks_and_budgets": {m: found for m in self.methods if (found := self._attacks_and_budgets(m))},
            "seconds": round(self.seconds, 1),
        }
        write_whole(self.folder / "results.json", _as_json(summary, indent=2), mode=0o644)


def _as_json(content: object, *, indent: int) -> bytes:
    """JSON, which has no NaN: a score that is none becomes null."""
    return json.dumps(_null_for_nan(content), indent=indent, allow_nan=False).encode()


def _null_for_nan(content: object) -> object:
    match content:
        case dict():
            return {key: _null_for_nan(value) for key, value in content.items()}
        case list() | tuple():
            return [_null_for_nan(value) for value in content]
        case float():
            return content if math.isfinite(content) else None
        case _:
            return content


def _number(score: float | None) -> float:
    return math.nan if score is None else score
