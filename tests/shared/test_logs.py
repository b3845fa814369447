from __future__ import annotations

import io
import json
import logging

import pytest

from medfl.shared.logs import set_up_logs


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
