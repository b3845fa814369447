"""The coordinator's figures, scraped over HTTP as Prometheus does."""

from __future__ import annotations

import urllib.request

import pytest
from tiny import classes_study

from medfl.server.metrics import Gauges
from medfl.server.reporter import RoundReport
from medfl.shared.errors import NetworkError
from medfl.shared.metrics_port import MetricsPort


def scraped(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_a_study_is_seen_from_outside() -> None:
    gauges = Gauges()
    study = classes_study(name="tiny")
    with MetricsPort(gauges.registry, 0) as port:
        gauges.started(study, 1)
        gauges.waiting(["north", "south"], ["north"], 2, {"south": "refused"})
        for number in (1, 2):
            gauges.finished_round(
                RoundReport(number, 2.5, {"north": "trained", "south": "no answer"}, {}, {"dice": 0.75}, {}, 1000)
            )
        seen = scraped(port.port)
        assert seen['medfl_study_running{study="tiny"}'] == 1
        assert seen['medfl_sites_online{study="tiny"}'] == 2
        assert seen['medfl_sites_taking_part{study="tiny"}'] == 1
        assert seen['medfl_round{study="tiny"}'] == 2
        assert seen['medfl_score{name="dice",study="tiny"}'] == 0.75
        assert seen['medfl_received_bytes_total{study="tiny"}'] == 2000
        assert seen['medfl_site_rounds_total{outcome="trained",site="north",study="tiny"}'] == 2
        assert seen['medfl_site_rounds_total{outcome="failed",site="south",study="tiny"}'] == 2
        gauges.ended("done")
        assert scraped(port.port)['medfl_study_running{study="tiny"}'] == 0


def test_a_port_in_use_is_told() -> None:
    registry = Gauges().registry
    with (
        MetricsPort(registry, 0) as port,
        pytest.raises(NetworkError, match="cannot listen"),
        MetricsPort(registry, port.port),
    ):
        pass
