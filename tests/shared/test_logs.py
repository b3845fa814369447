from __future__ import annotations

import io
import json
import logging
import os
import stat
from pathlib import Path

import pytest

from medfl.shared.errors import ConfigError
from medfl.shared.logs import StudyLog, set_up_logs


def test_a_line_of_text_an_event() -> None:
    stream = io.StringIO()
    set_up_logs(stream=stream)
    logging.getLogger("medfl.site").info("round %d", 3)
    logging.getLogger("medfl.site").debug("not shown")
    assert stream.getvalue().endswith("INFO    round 3\n")
    assert stream.getvalue().count("\n") == 1


def test_a_json_object_an_event() -> None:
    stream = io.StringIO()
    set_up_logs(json_lines=True, verbose=True, stream=stream)
    logging.getLogger("medfl.server").debug('two\nlines and "quotes"')
    entry = json.loads(stream.getvalue())
    assert (entry["level"], entry["logger"], entry["message"]) == ("debug", "medfl.server", 'two\nlines and "quotes"')
    assert stream.getvalue().count("\n") == 1


def test_libraries_that_quote_headers_are_not_heard(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    set_up_logs(stream=stream)
    for level in (logging.WARNING, logging.ERROR):
        logging.getLogger("pydicom").log(level, "PatientName MUSTERMANN^ERIKA")
    assert stream.getvalue() == ""
    assert capsys.readouterr().err == ""


def test_setting_up_twice_does_not_write_twice() -> None:
    stream = io.StringIO()
    set_up_logs(stream=stream)
    set_up_logs(stream=stream)
    logging.getLogger("medfl").info("once")
    assert stream.getvalue().count("once") == 1


def test_a_log_file_gets_the_same_events_and_nobody_else_reads_it(tmp_path: Path) -> None:
    set_up_logs(stream=io.StringIO(), file=tmp_path / "node.log")
    logging.getLogger("medfl").warning("disk full")
    assert (tmp_path / "node.log").read_text().endswith("WARNING disk full\n")
    assert stat.S_IMODE((tmp_path / "node.log").stat().st_mode) == 0o600


def test_a_log_file_is_rotated_and_five_older_ones_are_kept(tmp_path: Path) -> None:
    set_up_logs(stream=io.StringIO(), file=tmp_path / "node.log")
    for _ in range(8):  # 8 events of 6 MB: a file of 10 MB holds one
        logging.getLogger("medfl").info("x" * 6_000_000)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["node.log", *(f"node.log.{number}" for number in range(1, 6))]
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_log_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--log-file"):
        set_up_logs(stream=io.StringIO(), file=tmp_path / "absent" / "node.log")


def test_the_journal_gets_the_urgency_and_no_clock(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w+") as stream:
        status = os.fstat(stream.fileno())
        set_up_logs(stream=stream, verbose=True, environment={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        logger = logging.getLogger("medfl")
        logger.debug("a")
        logger.info("b")
        logger.warning("c\nd")
        logger.error("e")
        stream.seek(0)
        # syslog(3): 7 debug, 6 informational, 4 warning, 3 error
        assert stream.read().splitlines() == ["<7>a", "<6>b", "<4>c", "<4>d", "<3>e"]


def test_another_stream_than_the_journals_keeps_its_clock(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as stream:
        set_up_logs(stream=stream, environment={"JOURNAL_STREAM": "1:2"})
        logging.getLogger("medfl").info("b")
        stream.seek(0)
        assert stream.read().endswith("INFO    b\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, a disk that is always full, is Linux's")
def test_a_full_disk_costs_lines_of_the_file_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    full = StudyLog(Path("/dev/full"))
    logger = logging.getLogger("medfl.full")
    logger.addHandler(full)
    try:
        logger.error("there is no space for this")
    finally:
        logger.removeHandler(full)
        full.close()
    assert "Traceback" not in capfd.readouterr().err
