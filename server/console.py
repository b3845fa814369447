"""A study's progress for the person who watches: a live table on a terminal, one line a round elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from medfl.server.reporter import Reporter, RoundReport, Silent
from medfl.shared.metrics import headline
from medfl.shared.study import Study

log = logging.getLogger("medfl.server")


class LogLines(Silent):
    """One log line for each thing worth knowing; for files, journald and pipes."""

    def __init__(self) -> None:
        self._rounds = 0
        self._last_wait = ""

    def started(self, study: Study, next_round: int) -> None:
        """Say which study begins, or goes on."""
        self._rounds = study.rounds.count
        log.info("study %s (%s): rounds %d to %d", study.name, study.digest[:12], next_round, study.rounds.count)

    def waiting(
        self, online: Sequence[str], taking_part: Sequence[str], needed: int, refusals: Mapping[str, str]
    ) -> None:
        """Say so when what is awaited has changed."""
        line = f"waiting for sites: {len(taking_part)} of {needed} take part, online: {', '.join(online) or 'none'}"
        line += "".join(f"; {site} does not: {why}" for site, why in sorted(refusals.items()))
        if line != self._last_wait:
            log.info(line)
            self._last_wait = line

    def stage(self, round_number: int, stage: str, answered: Sequence[str], of: Sequence[str]) -> None:
        """Nothing: one line a round is enough."""

    def finished_round(self, report: RoundReport) -> None:
        """One line."""
        trouble = [f"{site}: {result}" for site, result in report.outcomes.items() if result != "trained"]
        log.info(
            "round %d/%d in %.1f s%s%s%s%s",
            report.round,
            self._rounds,
            report.seconds,
            f", training loss {report.training['loss']:.4f}" if "loss" in report.training else "",
            "".join(f", {name} {value:.3f}" for name, value in [headline(report.scores) or ("", 0.0)] if name),
            f" ({'; '.join(trouble)})" if trouble else "",
            f"; {report.note}" if report.note else "",
        )

    def ended(self, reason: str) -> None:
        """Say why."""
        log.info("study ended: %s", reason)


class LiveTable(Silent):
    """A table that is redrawn in place: round, time left, each site's state and last released score."""

    def __init__(self, console: Console, *, title: str = "") -> None:
        self._console = console
        self._title = title
        self._live: Live | None = None
        self._study: Study | None = None
        self._state: dict[str, str] = {}
        self._score: dict[str, str] = {}
        self._overall = ""
        self._round = 0
        self._times: list[float] = []
        self._began = time.monotonic()

    def started(self, study: Study, next_round: int) -> None:
        """Open the table."""
        self._study, self._round, self._times = study, next_round - 1, []
        self._state, self._score, self._overall = {}, {}, ""
        self._live = Live(console=self._console, refresh_per_second=4, get_renderable=self._render)
        self._live.start()

    def waiting(
        self, online: Sequence[str], taking_part: Sequence[str], needed: int, refusals: Mapping[str, str]
    ) -> None:
        """Show who is awaited."""
        for name in online:
            self._state[name] = "ready" if name in taking_part else refusals.get(name, "considering the study")
        self._overall = f"{len(taking_part)} of {needed} sites needed take part"

    def stage(self, round_number: int, stage: str, answered: Sequence[str], of: Sequence[str]) -> None:
        """Show who still works."""
        if not answered:
            self._began = time.monotonic()
        verb = "training" if stage == "training" else "evaluating"
        for name in of:
            self._state[name] = "done" if name in answered else verb

    def finished_round(self, report: RoundReport) -> None:
        """Show the scores."""
        self._round = report.round
        self._times.append(report.seconds)
        for name, result in report.outcomes.items():
            self._state[name] = result
        for name, scores in report.site_scores.items():
            if found := headline(scores):
                self._score[name] = f"{found[0]} {found[1]:.3f}"
        found = headline(report.scores)
        loss = report.training.get("loss")
        self._overall = "  ".join(
            part
            for part in (
                f"loss {loss:.4f}" if loss is not None else "",
                f"{found[0]} {found[1]:.3f}" if found else "",
                report.note,
            )
            if part
        )

    def ended(self, reason: str) -> None:
        """Close the table and leave its last state on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._console.print(f"study ended: {reason}")

    def _render(self) -> Group:
        if self._study is None:
            return Group()
        total = self._study.rounds.count
        left = ""
        if self._times:
            seconds = sum(self._times[-5:]) / len(self._times[-5:]) * (total - self._round)
            left = f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self._title or self._study.name, style="bold"),
            ProgressBar(total=total, completed=self._round, width=24),
            f"round {self._round}/{total}",
            left,
        )
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for name, state in sorted(self._state.items()):
            table.add_row(
                name, Text(state, style="dim" if state in ("ready", "done") else ""), self._score.get(name, "")
            )
        return Group(head, table, Text(self._overall, style="cyan"))


def reporter_for(console: Console, *, title: str = "") -> Reporter:
    """The live table on a terminal, log lines elsewhere."""
    return LiveTable(console, title=title) if console.is_terminal else LogLines()
