"""Administration of a running process through a Unix socket in its state folder, for its own account and root only.

Both halves: :class:`AdminSocket` answers in the process, :func:`ask` is what a command calls. A question and its answer
are one line of JSON each, and one connection carries one of both. Nothing of it is ever reachable over a network.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import socketserver
import stat
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from pydantic import ValidationError

from medfl.shared.config import Settings
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
from medfl.shared.files import PRIVATE_FILE, PRIVATE_FOLDER, private_folder
from medfl.shared.lock import only_one

log = logging.getLogger("medfl")

VERSION = 1
"""Of this protocol. Commands and the process they speak to come from one installation; an upgrade restarts both."""

LONGEST_LINE = 4 * 1024 * 1024
"""Bytes of a question or an answer; the largest study is 256 KiB."""

QUESTION_S, ANSWER_S = 5.0, 60.0
"""How long the process waits for a whole question, and a command for the answer."""

_LONGEST_PATH = 107  # bytes of sun_path, without the zero at its end
_DESCRIPTORS = Path("/proc/self/fd")
_CREDENTIALS = struct.Struct("3i")  # of struct ucred: process, user, group
_ERRORS = {
    error.code: error for error in (ConfigError, PolicyRefusal, DataError, NetworkError, ProtocolError, TrainingError)
}

Q = TypeVar("Q", bound=Settings)
A = TypeVar("A", bound=Settings)


@dataclass(frozen=True, slots=True)
class Verb(Generic[Q, A]):
    """One thing that can be asked of a running process: its name, and the types of question and answer."""

    name: str
    question: type[Q]
    answer: type[A]


class Nothing(Settings):
    """A question without arguments, or an answer without content."""


class NotRunning(MedFLError):
    """No process answers at this state folder."""


class AdminSocket:
    """Answers from a thread inside its ``with`` block: what :meth:`serve` was given before, from the first moment.

    The socket is ``state/admin/socket`` (0600, its folder 0700); the kernel's word on who connects is checked besides.
    What a killed process left behind is replaced. Functions are called one at a time, whoever asks; what they raise
    reaches the command as it is, when it is a :class:`MedFLError`.

    Raises on entry:
        ConfigError: another process serves this folder, the folder is open to others, or its path is too long here.
    """

    def __init__(self, state: Path) -> None:
        self._folder = _folder(state)
        self._answers: dict[str, tuple[Verb[Any, Any], Callable[[Any], Settings]]] = {}
        self._one_at_a_time = threading.Lock()
        self._stack = ExitStack()

    def serve(self, verb: Verb[Q, A], answer: Callable[[Q], A]) -> None:
        """Let ``answer`` answer questions of ``verb`` from now on, from a thread of its own."""
        self._answers[verb.name] = (verb, answer)

    def __enter__(self) -> Self:
        """Listen."""
        with ExitStack() as stack:
            _make_private(self._folder)
            stack.enter_context(only_one(self._folder))
            path = self._folder / "socket"
            path.unlink(missing_ok=True)  # of a killed process: we hold the folder
            with _address(path) as address:
                server = _Server(address, self._reply)
            stack.callback(path.unlink, missing_ok=True)
            stack.callback(server.server_close)
            path.chmod(PRIVATE_FILE)
            thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="admin", daemon=True)
            thread.start()
            stack.callback(server.shutdown)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening and remove the socket."""
        self._stack.close()

    def _reply(self, line: bytes | MedFLError) -> bytes:
        """The answer to one line, or to what was wrong with it."""
        try:
            if isinstance(line, MedFLError):
                raise line
            answer, question = self._parse(line)
            with self._one_at_a_time:
                answered = answer(question)
            return _dump({"answer": answered.model_dump(mode="json")})
        except MedFLError as error:
            return _dump({"error": {"code": error.code.value, "text": str(error), "reason": error.reason}})
        except Exception as error:
            # The text of a library's error may hold a path or a header: only where it happened is logged.
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("administration: unexpected %s at\n%s", type(error).__name__, frames)
            text = f"unexpected {type(error).__name__} in the running process: its log says where"
            return _dump({"error": {"code": Code.UNEXPECTED.value, "text": text, "reason": ""}})

    def _parse(self, line: bytes) -> tuple[Callable[[Any], Settings], Settings]:
        envelope = _parse_line(line, {"version", "verb", "question"})
        if envelope["version"] != VERSION:
            raise ProtocolError("the running process is of another release than this command: restart it")
        known = self._answers.get(str(envelope["verb"]))
        if known is None:
            raise ProtocolError(f"the running process does not know {str(envelope['verb'])[:40]!r}: restart it")
        verb, answer = known
        return answer, _read(verb.question, envelope["question"], "question")


def ask(state: Path, verb: Verb[Q, A], question: Q, *, timeout_s: float = ANSWER_S) -> A:
    """Put ``question`` to the process whose state folder is ``state``, and return its answer.

    Raises:
        NotRunning: none is there.
        ConfigError: it belongs to another account, or the folder's path is too long here.
        NetworkError: it did not answer in time, or died while it worked.
        MedFLError: what the process raised, of the same class, with the same words.
    """
    envelope = _dump({"version": VERSION, "verb": verb.name, "question": question.model_dump(mode="json")})
    path = _folder(state) / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(timeout_s)
        try:
            with _address(path) as address:
                line.connect(address)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            raise NotRunning(f"nothing runs with the state folder {state}: start it first") from None
        except PermissionError:
            raise ConfigError(
                f"{state} belongs to another account: run this command as the account that the process runs as"
            ) from None
        except OSError as error:
            raise NetworkError(f"{path} cannot be reached ({error.strerror})") from None
        try:
            line.sendall(envelope)
            reply = _parse_line(_read_line(line, timeout_s), {"answer", "error"}, every=False)
        except (TimeoutError, OSError):
            raise NetworkError(
                f"the running process did not answer within {timeout_s:.0f} s, or ended meanwhile: look at its log"
            ) from None
    if "answer" in reply:
        return _read(verb.answer, reply["answer"], "answer")
    raise _error(reply.get("error"))


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, address: str, reply: Callable[[bytes | MedFLError], bytes]) -> None:
        self.reply = reply
        super().__init__(address, _Connection)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether the kernel says that the other end is this account or root."""
        user = _peer(request)
        if user in (0, os.geteuid()):
            return True
        log.warning("administration: a process of user %d was turned away", user)
        return False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A command that went away before its answer is no event."""


class _Connection(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        question: bytes | MedFLError
        try:
            question = _read_line(self.request, QUESTION_S)
        except ProtocolError as error:
            question = error
        self.request.settimeout(ANSWER_S)
        self.request.sendall(self.server.reply(question))


def _folder(state: Path) -> Path:
    return state / "admin"


def _make_private(folder: Path) -> None:
    """Make the socket's folder, or make sure that it is ours alone."""
    try:
        private_folder(folder)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be used ({error.strerror}): choose another state folder") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ConfigError(f"{folder} is not a folder of this account: remove it, or choose another state folder")
    if stat.S_IMODE(found.st_mode) & ~PRIVATE_FOLDER:
        raise ConfigError(f"{folder} is open to others: run chmod 700 on it")


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """``path`` as a socket's address. Where it is too long for one, by way of a descriptor of its folder (Linux)."""
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        yield str(path)
        return
    if not _DESCRIPTORS.is_dir():
        raise ConfigError(
            f"state: the path of {path} is longer than the {_LONGEST_PATH} bytes that a socket's may have: "
            "choose a shorter state folder"
        )
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"{_DESCRIPTORS}/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


def _peer(line: socket.socket) -> int:
    """The user at the other end, as the kernel noted it when it connected."""
    credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])


def _read_line(line: socket.socket, timeout_s: float) -> bytes:
    """One line without its end, however slowly it comes. Raises TimeoutError, ConnectionError, ProtocolError."""
    ends, parts, size = time.monotonic() + timeout_s, [], 0
    while True:
        left = ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        line.settimeout(left)
        part = line.recv(65536)
        if not part:
            raise ConnectionResetError("the other side ended in the middle of a line")
        head, newline, _ = part.partition(b"\n")
        parts.append(head)
        size += len(head)
        if size > LONGEST_LINE:
            raise ProtocolError(f"a line is longer than {LONGEST_LINE} bytes")
        if newline:
            return b"".join(parts)


def _dump(content: dict[str, Any]) -> bytes:
    line = json.dumps(content, allow_nan=False).encode()
    if len(line) > LONGEST_LINE:
        raise ProtocolError(f"a line of the administration socket may have {LONGEST_LINE} bytes at most")
    return line + b"\n"


def _parse_line(line: bytes, keys: set[str], *, every: bool = True) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        raise ProtocolError("a line of the administration socket is not JSON") from None
    if not isinstance(content, dict) or (set(content) != keys if every else not set(content) <= keys):
        raise ProtocolError("a line of the administration socket does not hold what it should")
    return content


def _read(model: type[A], content: Any, what: str) -> A:
    try:
        return model.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(f"the {what} is malformed: {where}: {first['msg']}: restart the process") from None


def _error(content: Any) -> MedFLError:
    if not isinstance(content, dict) or not {"code", "text"} <= set(content):
        return ProtocolError("the running process answered something that is no answer: look at its log")
    kinds: dict[str, type[MedFLError]] = {code.value: kind for code, kind in _ERRORS.items()}
    kind = kinds.get(str(content["code"]), MedFLError)
    return kind(str(content["text"]), reason=str(content.get("reason", "")))
