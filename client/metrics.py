"""The node's figures for Prometheus: connected or not, what came and left, what is spent. No patient, no image."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from medfl.client.audit import Event
from medfl.client.node import Phase


class Gauges:
    """Told by the node how it is, and by the audit log of each row: the figures can say no more than the log does."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def gauge(name: str, says: str) -> Gauge:
            return Gauge(f"medfl_{name}", says, registry=self.registry)

        self._online = gauge("online", "1 while the coordinator is connected")
        self._working = gauge("working", "1 while a message is being answered")
        self._round = gauge("round", "Round of the last message that named one")
        self._epsilon = gauge("epsilon_total", "Epsilon that each patient has spent at this site, over all studies")
        self._rows = gauge("audit_rows", "Rows that this process has written to the audit log")
        self._received = Counter("medfl_received_bytes", "Bytes received", ["kind"], registry=self.registry)
        self._left = Counter("medfl_left_bytes", "Bytes that left, by form", ["kind", "form"], registry=self.registry)
        self._answers = Counter("medfl_answers", "Answers, by outcome", ["kind", "outcome"], registry=self.registry)

    def phase(self, phase: Phase) -> None:
        """How the node is."""
        self._online.set(phase is not Phase.WAITING)
        self._working.set(phase is Phase.WORKING)

    def spent(self, epsilon_total: float) -> None:
        """What the ledger says when the node starts: the next private message may be weeks away."""
        self._epsilon.set(epsilon_total)

    def row(self, row: Mapping[str, str | float]) -> None:
        """One row of the audit log, see :mod:`medfl.client.audit`."""
        self._rows.inc()
        kind, size = str(row.get("kind", "")), float(row.get("bytes", 0))
        if "round" in row:
            self._round.set(float(row["round"]))
        if row["event"] == Event.IN:
            self._received.labels(kind).inc(size)
        elif row["event"] == Event.OUT:
            self._left.labels(kind, str(row["form"])).inc(size)
            self._answers.labels(kind, str(row["outcome"])).inc()
            if "epsilon_total" in row:
                self._epsilon.set(float(row["epsilon_total"]))
