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


class Three:
    """A directory whose sites leave one by one."""

    def __init__(self) -> None:
        self.nodes = {1, 2, 3}

    def online(self) -> set[int]:
        return self.nodes


def test_who_is_there_is_counted_whenever_a_stage_begins() -> None:
    gauges, three = Gauges(), Three()
    gauges.watch(three)
    gauges.started(classes_study(name="tiny"), 1)
    gauges.waiting(["north"], [], 2, {})

    def figures() -> tuple[float | None, float | None]:
        read = gauges.registry.get_sample_value
        return read("medfl_sites_online", {"study": "tiny"}), read("medfl_sites_taking_part", {"study": "tiny"})

    assert figures() == (1, 0)
    gauges.stage(1, "training", [], ["north", "south"])
    assert figures() == (3, 2)
    three.nodes.remove(3)
    gauges.stage(1, "training", ["north"], ["north", "south"])
    assert figures() == (3, 2)
    gauges.stage(1, "evaluation", [], ["north"])
    assert figures() == (2, 1)


def test_a_port_in_use_is_told() -> None:
    registry = Gauges().registry
    with (
        MetricsPort(registry, 0) as port,
        pytest.raises(NetworkError, match="cannot listen"),
        MetricsPort(registry, port.port),
    ):
        pass
