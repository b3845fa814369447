from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from medfl.shared.command import run, say
from medfl.shared.errors import (
    Code,
    ConfigError,
    DataError,
    MedFLError,
    NetworkError,
    PolicyRefusal,
    ProtocolError,
    TrainingError,
)


def failing(error: BaseException) -> int:
    def work() -> int:
        raise error

    return run("medfl-x", work)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MedFLError("a"), 1),
        (ConfigError("a"), 2),
        (PolicyRefusal("a"), 3),
        (DataError("a"), 4),
        (NetworkError("a"), 5),
        (ProtocolError("a"), 1),
        (TrainingError("a"), 1),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 1),
    ],
)
def test_each_error_has_its_exit_status_and_one_line(
    error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(error) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("medfl-x: ")
    assert err.count("\n") == 1


def test_an_error_of_several_problems_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    failing(ConfigError("a\nb"))
    assert capsys.readouterr().err == "medfl-x: a\nmedfl-x: b\n"


def test_what_is_said_fits_a_terminal_and_hashes_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    say(["letters " * 20, "  " + "0f" * 32, "the hash is " + "0f" * 64])
    lines = capsys.readouterr().out.splitlines()
    assert [len(line) for line in lines] == [79, 79, 66, 11, 128]  # twice 10 words and 9 spaces; two hashes
    assert lines[2:] == ["  " + "0f" * 32, "the hash is", "0f" * 64]


def test_a_file_name_in_an_error_of_the_system_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    failing(PermissionError(13, "Permission denied", "/images/MUSTERMANN^ERIKA.dcm"))
    assert capsys.readouterr().err == "medfl-x: the operating system refused: Permission denied\n"


def test_what_work_returns_is_the_exit_status() -> None:
    assert run("medfl-x", lambda: 7) == 7


def test_each_kind_of_error_has_a_code_of_its_own() -> None:
    kinds = [MedFLError, ConfigError, PolicyRefusal, DataError, NetworkError, ProtocolError, TrainingError]
    assert {kind.code for kind in kinds} == set(Code)


def test_a_signal_may_come_while_the_main_thread_holds_the_lock() -> None:
    code = """
import os, signal, threading
from medfl.shared.command import on_termination
stop = threading.Event()
on_termination(stop.set)
with stop._cond:  # as inside Event.wait
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000): pass  # the handler runs here
assert stop.wait(60)
print("stopped")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout == "stopped\n", done.stderr


@pytest.mark.parametrize("lines", [1, 100_000])  # of the one, the last flush tells; of the many, the printing
def test_output_that_nobody_reads_ends_the_command_without_a_word(lines: int) -> None:
    code = f"""
from medfl.shared.command import run
def work():
    input()
    for _ in range({lines}): print("a line of a report")
    return 0
raise SystemExit(run("medfl-x", work))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(240) == 141


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_has_no_letters_for_is_written_in_ascii_and_ends_nothing(encoding: str) -> None:
    code = """
import sys
from medfl.shared.command import run
from medfl.shared.errors import DataError
def work():
    print("lungs\u2026")
    raise DataError("study \u03b5 has no data")
raise SystemExit(run("medfl-x", work))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": f"{encoding}:strict"},
        capture_output=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout) == (4, b"lungs\\u2026\n")
    assert done.stderr == b"medfl-x: study \\u03b5 has no data\n"


def test_streams_that_cannot_be_reconfigured_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert run("medfl-x", lambda: 7) == 7


def test_a_connection_that_broke_is_told_while_somebody_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(BrokenPipeError(32, "Broken pipe")) == 1
    assert capsys.readouterr().err == "medfl-x: the operating system refused: Broken pipe\n"
