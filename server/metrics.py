"""The coordinator's figures for Prometheus: studies, rounds, sites, scores. Nothing a site did not release."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge

from medfl.server.collector import TRAINED
from medfl.server.reporter import RoundReport, Silent
from medfl.shared.study import Study


class Connected(Protocol):
    """Knows which sites are connected."""

    def online(self) -> Collection[int]:
        """Their nodes, now."""
        ...


class Gauges(Silent):
    """Listens to studies and keeps ``registry`` up to date."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._study = ""
        self._connected: Connected | None = None

        def gauge(name: str, says: str, labels: Sequence[str] = ("study",)) -> Gauge:
            return Gauge(f"medfl_{name}", says, labels, registry=self.registry)

        def counter(name: str, says: str, labels: Sequence[str] = ("study",)) -> Counter:
            return Counter(f"medfl_{name}", says, labels, registry=self.registry)

        self._running = gauge("study_running", "1 while the study runs")
        self._planned = gauge("rounds_planned", "Rounds the study asks for")
        self._round = gauge("round", "Last complete round")
        self._seconds = gauge("round_seconds", "Time that the last round took")
        self._online = gauge("sites_online", "Sites connected when last awaited, or when a stage began")
        self._taking_part = gauge(
            "sites_taking_part", "Sites connected that accepted the study; in a round, those asked"
        )
        self._answered = gauge("stage_answers", "Sites that have answered the stage in progress")
        self._score = gauge("score", "Held-out score over all sites, of the last evaluated round", ("study", "name"))
        self._received = counter("received_bytes", "Bytes of results received")
        self._outcomes = counter(
            "site_rounds", "Rounds by site and by whether it trained", ("study", "site", "outcome")
        )

    def watch(self, connected: Connected) -> None:
        """Count the sites of ``connected`` whenever a stage begins: nobody is awaited while a round runs."""
        self._connected = connected

    def started(self, study: Study, next_round: int) -> None:
        """The study runs from now on."""
        self._study = study.name
        self._running.labels(study.name).set(1)
        self._planned.labels(study.name).set(study.rounds.count)
        self._round.labels(study.name).set(max(0, next_round - 1))

    def waiting(
        self, online: Sequence[str], taking_part: Sequence[str], needed: int, refusals: Mapping[str, str]
    ) -> None:
        """Who is there."""
        self._online.labels(self._study).set(len(online))
        self._taking_part.labels(self._study).set(len(taking_part))

    def stage(self, round_number: int, stage: str, answered: Sequence[str], of: Sequence[str]) -> None:
        """How many have answered, of whom; with its beginning also who is there."""
        if not answered:
            self._taking_part.labels(self._study).set(len(of))
            if self._connected is not None:
                self._online.labels(self._study).set(len(self._connected.online()))
        self._answered.labels(self._study).set(len(answered))

    def finished_round(self, report: RoundReport) -> None:
        """Everything about the round."""
        self._round.labels(self._study).set(report.round)
        self._seconds.labels(self._study).set(report.seconds)
        self._received.labels(self._study).inc(report.received_bytes)
        for name, value in report.scores.items():
            self._score.labels(self._study, name).set(value)
        for site, outcome in report.outcomes.items():
            self._outcomes.labels(self._study, site, "trained" if outcome == TRAINED else "failed").inc()

    def ended(self, reason: str) -> None:
        """The study does not run any more."""
        self._running.labels(self._study).set(0)
