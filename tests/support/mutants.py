"""Take each check out of the secure aggregation, one at a time, and see that a test notices.

    python tests/support/mutants.py                       all files, some 20 minutes on one core
    python tests/support/mutants.py client/secagg/journal.py shared/secagg/roster.py

A mutant is one file with one thing gone: a condition before a ``raise`` or ``return`` that never holds, or a statement
that is only a call, such as a verified signature or a line in the journal. Each runs the tests of its file in a process
of its own; a mutant that they all pass is printed as ALIVE, and makes the exit status 1. What may be alive, because
nothing that is promised depends on it, stands in ``HARMLESS`` with the reason.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import io
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("client/secagg", "server/secagg", "shared/secagg")
SUMS = ["tests/secagg/test_restarts.py", "tests/secagg/test_exact_sum.py"]
TESTS = {
    "client/secagg": ["tests/client/secagg", *SUMS],
    "server/secagg": ["tests/server/secagg", *SUMS],
    "shared/secagg": ["tests/shared/secagg", "tests/client/secagg", "tests/server/secagg", *SUMS],
}
HARMLESS: dict[tuple[str, str], str] = {
    ("client/secagg/journal.py", "database.execute('SELECT count(*) FROM sqlite_master')"): (
        "a damaged file is found by the next statement too"
    ),
    ("client/secagg/session.py", "self._enrolments.under(announcement.roster, finishing=True)"): (
        "each reply is made under the same check; a reveal that is sent again is the very bytes that left before"
    ),
    ("shared/secagg/prg.py", "parts == 1"): "a pool of one thread does the same, later",
    ("server/secagg/round.py", "self._log(few, cohort, refusals)"): "a line for people",
}
"""(file, source of what is gone): why nothing that is promised depends on it."""


@dataclass(frozen=True)
class Mutant:
    """``source`` of the whole file without ``gone``, which stood in ``line``."""

    file: str
    line: int
    gone: str
    source: str


def mutants_of(file: str) -> Iterator[Mutant]:
    """Every mutant of ``file``, in the order of its lines."""
    text = (ROOT / file).read_text("utf-8")
    places = [node for node in ast.walk(ast.parse(text)) if _is_check(node)]
    for place in sorted(places, key=lambda node: (node.lineno, node.col_offset)):
        tree = ast.parse(text)
        same = next(node for node in ast.walk(tree) if _is_check(node) and _at(node) == _at(place))
        if isinstance(same, ast.If):
            gone, same.test = ast.unparse(same.test), ast.Constant(False)
        else:
            gone, same.value = ast.unparse(same.value), ast.Constant(None)
        yield Mutant(file, place.lineno, gone, ast.unparse(ast.fix_missing_locations(tree)))


def _at(node: Any) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _is_check(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return isinstance(node.body[-1], ast.Raise | ast.Return | ast.Continue)
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    return not ast.unparse(node.value).startswith(("log.", "super()."))


def killer_of(mutant: Mutant) -> str:
    """The first test that notices ``mutant``, empty where none does. In a process of its own, forked from this one."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            os.write(writing, _first_failure(mutant).encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return "" if said == "none" else said or "the test process itself ended"


def _first_failure(mutant: Mutant) -> str:
    import pytest

    loader: Any = importlib.machinery.SourceFileLoader
    original = loader.get_code

    def get_code(self: Any, name: str) -> Any:
        if Path(self.path).resolve() == ROOT / mutant.file:
            return compile(mutant.source, self.path, "exec")
        return original(self, name)

    loader.get_code = get_code
    failed: list[str] = []

    class Watch:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)

    tests = TESTS[str(Path(mutant.file).parent)]
    own = [path for folder in tests if (ROOT / (path := f"{folder}/test_{Path(mutant.file).name}")).exists()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for chosen in (own, tests) if own else (tests,):  # nearly all are noticed by the file's own test
            if not failed:
                pytest.main(["-x", "-q", "-p", "no:cacheprovider", *chosen], plugins=[Watch()])
    return failed[0] if failed else "none"


def main(files: list[str]) -> int:
    """Print a line for each mutant; 1 when one is alive that should not be."""
    for heavy in ("numpy", "cryptography.hazmat.primitives.ciphers.aead", "hypothesis", "pytest", "torch", "pydantic"):
        __import__(heavy)
    __import__("flwr.app")
    alive = 0
    files = files or sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
    for file in files:
        for mutant in mutants_of(file):
            began = time.monotonic()
            killer = killer_of(mutant)
            reason = HARMLESS.get((file, mutant.gone))
            word = killer or (f"harmless: {reason}" if reason else "ALIVE")
            alive += not killer and reason is None
            gone = " ".join(mutant.gone.split())[:90]
            print(f"{file}:{mutant.line}: {gone}\n    {word} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{alive} alive")
    return int(alive > 0)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(sys.argv[1:]))
