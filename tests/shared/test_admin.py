"""The administration socket: who may ask, what comes back, and what is left of a killed process."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfl.shared import admin
from medfl.shared.admin import AdminSocket, Nothing, NotRunning, Verb, ask
from medfl.shared.config import Settings
from medfl.shared.errors import ConfigError, DataError, MedFLError, NetworkError, PolicyRefusal, ProtocolError


class Pair(Settings):
    a: int
    b: int = 1


class Total(Settings):
    total: int


ADD = Verb("add", Pair, Total)
FAIL = Verb("fail", Nothing, Nothing)


def add(pair: Pair) -> Total:
    return Total(total=pair.a + pair.b)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[AdminSocket]:
    made = AdminSocket(tmp_path)
    made.serve(ADD, add)
    with made:
        yield made


def raw(state: Path, line: bytes) -> bytes:
    """What comes back for ``line`` as it is."""
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(60)
        end.connect(str(state / "admin" / "socket"))
        end.sendall(line)
        parts = []
        while part := end.recv(65536):
            parts.append(part)
        return b"".join(parts)


def error_of(reply: bytes) -> str:
    return str(json.loads(reply)["error"]["text"])


def test_a_question_gets_its_typed_answer(running: AdminSocket, tmp_path: Path) -> None:
    assert ask(tmp_path, ADD, Pair(a=2, b=40)) == Total(total=42)
    assert [ask(tmp_path, ADD, Pair(a=n)).total for n in range(3)] == [1, 2, 3]


def test_only_the_account_can_reach_the_socket(running: AdminSocket, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "admin").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "admin" / "socket").stat().st_mode) == 0o600


def test_the_kernels_word_on_the_other_end_counts_besides(
    running: AdminSocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "_peer", lambda line: os.geteuid() + 4321)
    with pytest.raises(NetworkError, match="did not answer"):
        ask(tmp_path, ADD, Pair(a=1))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_account_is_turned_away_even_where_the_files_would_let_it_in() -> None:
    ask_as_nobody = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.settimeout(60)\n"
        "s.connect(sys.argv[1])\n"
        'try: s.sendall(b\'{"version":1,"verb":"add","question":{"a":1}}\\n\'); print(s.recv(100))\n'
        "except OSError: print('cut off')"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        state = Path(folder)
        with AdminSocket(state) as running:
            running.serve(ADD, add)
            path = state / "admin" / "socket"
            command = [sys.executable, "-c", ask_as_nobody, str(path)]
            shut = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
            assert "PermissionError" in shut.stderr
            for opened in (state, path.parent):
                opened.chmod(0o755)
            path.chmod(0o777)
            done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
            assert done.stdout.strip() in ("b''", "cut off")
            assert ask(state, ADD, Pair(a=1)) == Total(total=2)  # we ourselves still may


@pytest.mark.parametrize("kind", [ConfigError, PolicyRefusal, DataError, ProtocolError, MedFLError])
def test_what_the_process_raises_reaches_the_command(
    running: AdminSocket, tmp_path: Path, kind: type[MedFLError]
) -> None:
    def fail(question: Nothing) -> Nothing:
        raise kind("say it so", reason="a word")

    running.serve(FAIL, fail)
    with pytest.raises(kind, match=r"^say it so$") as caught:
        ask(tmp_path, FAIL, Nothing())
    assert type(caught.value) is kind
    assert caught.value.reason == "a word"


def test_a_mistake_in_the_process_shows_no_text_and_stops_nothing(
    running: AdminSocket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    patient = "Doe^John"

    def fail(question: Nothing) -> Nothing:
        raise KeyError(patient)

    running.serve(FAIL, fail)
    with pytest.raises(MedFLError, match="unexpected KeyError") as caught:
        ask(tmp_path, FAIL, Nothing())
    assert caught.value.exit_status == 1
    assert "Doe" not in str(caught.value) + caplog.text
    assert ask(tmp_path, ADD, Pair(a=1)).total == 2


def test_nothing_runs_is_an_answer_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match="nothing runs"):
        ask(tmp_path / "never", ADD, Pair(a=1))
    with AdminSocket(tmp_path):
        pass
    with pytest.raises(NotRunning):
        ask(tmp_path, ADD, Pair(a=1))


def test_two_processes_are_refused_and_the_first_goes_on(running: AdminSocket, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in use by another process"), AdminSocket(tmp_path):
        pass
    running.serve(ADD, add)
    assert ask(tmp_path, ADD, Pair(a=1)).total == 2


def test_what_a_killed_process_leaves_is_replaced(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from medfl.shared.admin import AdminSocket\n"
        "with AdminSocket(Path(sys.argv[1])): print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    with pytest.raises(ConfigError, match="in use"), AdminSocket(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    assert (tmp_path / "admin" / "socket").exists()
    with pytest.raises(NotRunning):
        ask(tmp_path, ADD, Pair(a=1))
    with AdminSocket(tmp_path) as running:
        running.serve(ADD, add)
        assert ask(tmp_path, ADD, Pair(a=1)).total == 2


def test_a_path_too_long_for_a_sockets_address_works_all_the_same(tmp_path: Path) -> None:
    state = tmp_path / ("long" * 30) / ("path" * 30)
    with pytest.raises(NotRunning):
        ask(state, ADD, Pair(a=1))
    with AdminSocket(state) as running:
        running.serve(ADD, add)
        assert len(str(state / "admin" / "socket")) > 200
        assert ask(state, ADD, Pair(a=1)).total == 2


def test_where_the_kernel_has_no_way_round_a_long_path_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_DESCRIPTORS", tmp_path / "absent")
    with pytest.raises(ConfigError, match="longer than the 107 bytes"), AdminSocket(tmp_path / ("long" * 30)):
        pass


def test_a_folder_that_is_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "admin").mkdir(mode=0o755)
    (tmp_path / "admin").chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"), AdminSocket(tmp_path):
        pass


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "admin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not a folder"), AdminSocket(tmp_path):
        pass


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"hello\n", "not JSON"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b"[]\n", "does not hold"),
        (b'{"version": 1, "verb": "add"}\n', "does not hold"),
        (b'{"version": 2, "verb": "add", "question": {"a": 1}}\n', "another release"),
        (b'{"version": 1, "verb": "sub", "question": {"a": 1}}\n', "does not know 'sub'"),
        (b'{"version": 1, "verb": "add", "question": {"a": "x"}}\n', "malformed: a:"),
        (b'{"version": 1, "verb": "add", "question": {"a": 1, "c": 2}}\n', "malformed: c:"),
    ],
)
def test_a_malformed_question_is_answered_in_words(
    running: AdminSocket, tmp_path: Path, line: bytes, said: str
) -> None:
    assert said in error_of(raw(tmp_path, line))


@given(line=st.binary(max_size=200))
def test_no_bytes_break_it(line: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = AdminSocket(tmp_path_factory.getbasetemp())
    made.serve(ADD, add)
    assert "error" in json.loads(made._reply(line.replace(b"\n", b"")))


def test_a_question_that_is_too_large_is_cut_off(
    running: AdminSocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "LONGEST_LINE", 1000)
    with pytest.raises(ProtocolError, match="1000 bytes"):
        ask(tmp_path, Verb("add", Total, Total), Total(total=10**1200))
    assert "longer than 1000" in error_of(raw(tmp_path, b"1" * 1001))
    assert ask(tmp_path, ADD, Pair(a=1)).total == 2


def test_an_answer_that_is_too_large_is_told(
    running: AdminSocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "LONGEST_LINE", 1000)
    running.serve(ADD, lambda pair: Total(total=10**1200))
    with pytest.raises(ProtocolError, match="1000 bytes"):
        ask(tmp_path, ADD, Pair(a=1))


def test_a_slow_or_silent_command_keeps_nobody_waiting(
    running: AdminSocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "QUESTION_S", 1.0)
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(tmp_path / "admin" / "socket"))
        began = time.monotonic()
        assert ask(tmp_path, ADD, Pair(a=1)).total == 2
        slow.settimeout(60)
        received = None
        while received is None:
            assert time.monotonic() - began < 60
            try:
                slow.send(b" ")  # a byte now and then does not buy more time
                slow.settimeout(0.05)
                received = slow.recv(100)
            except TimeoutError:
                continue
            except OSError:
                received = b""
        assert received == b""


def test_a_process_that_takes_too_long_is_told(running: AdminSocket, tmp_path: Path) -> None:
    release = threading.Event()

    def wait(question: Nothing) -> Nothing:
        release.wait(60)
        return Nothing()

    running.serve(FAIL, wait)
    with pytest.raises(NetworkError, match="did not answer within 0 s"):
        ask(tmp_path, FAIL, Nothing(), timeout_s=0.2)
    release.set()


def test_questions_are_answered_one_at_a_time(running: AdminSocket, tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(pair: Pair) -> Total:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return Total(total=pair.a)

    running.serve(ADD, work)
    threads = [threading.Thread(target=ask, args=(tmp_path, ADD, Pair(a=n))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 8
