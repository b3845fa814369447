from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from rich.console import Console
from tiny import classes_study

from medfl.server.console import LiveTable, LogLines, reporter_for
from medfl.server.reporter import MetricsFile, RoundReport, Several, Silent

STUDY = classes_study(rounds={"count": 3})


def report(number: int) -> RoundReport:
    return RoundReport(
        round=number,
        seconds=1.23456,
        outcomes={"a": "trained", "b": "no answer"},
        training={"loss": 0.5},
        scores={"dice": 0.75},
        site_scores={"a": {"dice": 0.8}},
        received_bytes=100,
    )


def rounds_in(path: Path) -> list[int]:
    return [json.loads(line)["round"] for line in path.read_text().splitlines()]


def test_each_round_is_one_line_of_json(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.started(STUDY, 1)
    file.finished_round(report(1))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "round": 1,
        "seconds": 1.235,
        "outcomes": {"a": "trained", "b": "no answer"},
        "training": {"loss": 0.5},
        "scores": {"dice": 0.75},
        "site_scores": {"a": {"dice": 0.8}},
        "received_bytes": 100,
    }


def test_rounds_that_are_run_again_replace_their_lines(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m")
    for number in (1, 2, 3):
        file.finished_round(report(number))
    MetricsFile(tmp_path / "m").started(STUDY, 2)
    assert rounds_in(tmp_path / "m") == [1]


@pytest.mark.parametrize("rest", ['{"round": 3, "sec', '{"round": 3, "sec\n', "\0\0\0\n", "[]\n", '{"no": 1}\n'])
def test_what_a_crash_left_is_dropped_and_does_not_stop_the_next_start(tmp_path: Path, rest: str) -> None:
    file = MetricsFile(tmp_path / "m")
    file.finished_round(report(1))
    with (tmp_path / "m").open("a") as crashed:
        crashed.write(rest)
    file.started(STUDY, 3)
    file.finished_round(report(3))
    assert rounds_in(tmp_path / "m") == [1, 3]


def test_several_reporters_hear_everything() -> None:
    class Hears(Silent):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def started(self, *a: object) -> None:
            self.heard.append("started")

        def waiting(self, *a: object) -> None:
            self.heard.append("waiting")

        def stage(self, *a: object) -> None:
            self.heard.append("stage")

        def finished_round(self, *a: object) -> None:
            self.heard.append("finished")

        def ended(self, *a: object) -> None:
            self.heard.append("ended")

    one, two = Hears(), Hears()
    tell_all(Several(one, two))
    assert one.heard == two.heard == ["started", "waiting", "stage", "stage", "finished", "ended"]


def tell_all(reporter: Several | LiveTable | LogLines) -> None:
    reporter.started(STUDY, 1)
    reporter.waiting(["a", "b"], ["a"], 2, {"b": "refused: study not approved"})
    reporter.stage(1, "training", [], ["a", "b"])
    reporter.stage(1, "training", ["a"], ["a", "b"])
    reporter.finished_round(report(1))
    reporter.ended("done")


def test_a_log_has_a_line_for_each_round_and_names_who_was_missing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "medfl"):
        tell_all(LogLines())
    text = caplog.text
    assert "round 1/3 in 1.2 s, training loss 0.5000, dice 0.750 (b: no answer)" in text
    assert "study not approved" in text
    assert "study ended: done" in text


def test_a_terminal_shows_round_loss_scores_and_time_left() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    reporter = reporter_for(console, title="lungs")
    assert isinstance(reporter, LiveTable)
    tell_all(reporter)
    shown = stream.getvalue()
    for words in ("lungs", "round 1/3", "0:02 left", "loss 0.5000", "dice 0.750", "no answer", "study ended: done"):
        assert words in shown


def test_a_pipe_gets_log_lines() -> None:
    assert isinstance(reporter_for(Console(file=io.StringIO())), LogLines)


def test_rows_that_a_full_disk_did_not_take_follow_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = MetricsFile(tmp_path / "m")
    file.finished_round(report(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medfl.server.reporter.append_whole", full)
    file.finished_round(report(2))
    assert rounds_in(tmp_path / "m") == [1]
    monkeypatch.undo()
    file.finished_round(report(3))
    assert rounds_in(tmp_path / "m") == [1, 2, 3]
