"""Every test that the documents for security officers name exists under that name."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("docs/threat-model.md", "docs/secure-aggregation.md")


def named(document: str) -> set[tuple[str, str]]:
    text = (ROOT / document).read_text("utf-8")
    return set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text))


@cache
def functions_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_named_test_exists(document: str) -> None:
    missing = {(path, name) for path, name in named(document) if name not in functions_in(path)}
    assert missing == set()


def test_every_claim_of_the_threat_model_names_a_test() -> None:
    text = (ROOT / DOCUMENTS[0]).read_text("utf-8")
    body = text[text.index("## A stranger on the network") : text.index("## What is not covered")]
    rows = [line for line in body.splitlines() if line.startswith("| ") and not line.startswith("|---")]
    claims = [row for row in rows if not re.match(r"\| (he|it|claim)( tries)? \|", row)]
    assert len(claims) > 40
    assert [claim for claim in claims if "`tests/" not in claim] == []


def test_every_row_about_secure_aggregation_names_a_test() -> None:
    text = (ROOT / DOCUMENTS[1]).read_text("utf-8")
    table = text[text.index("| what is tried | test |") :].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == 28
    assert [row for row in table if "`tests/" not in row] == []


def test_every_file_of_tests_that_the_manual_of_privacy_names_exists() -> None:
    text = (ROOT / "docs/privacy.md").read_text("utf-8")
    named_files = re.findall(r"`(?:pytest )?(tests/[\w/]+(?:\.py)?)/?`", text)
    assert len(named_files) > 15
    assert [path for path in named_files if not (ROOT / path).exists()] == []
