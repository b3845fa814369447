"""Every example of the administrator's page is valid; mistakes in settings are refused."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from medfl.client.data.settings import DataSettings, DicomwebSettings, DimseSettings
from medfl.shared.config import Settings, parse_settings
from medfl.shared.errors import ConfigError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "data.md"
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


class Site(Settings):
    data: DataSettings


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_example_of_the_page_is_valid(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDFL_DATA", str(tmp_path))
    password = tmp_path / "pacs-password"
    password.write_text("x")
    password.chmod(0o600)
    parse_settings(EXAMPLES[number], Site, name="site.yaml", folder=tmp_path)


def test_the_page_shows_every_source() -> None:
    shown = {re.search(r"source: (\w+)", example)[1] for example in EXAMPLES}  # type: ignore[index]
    assert shown == {"dicom", "dicomweb", "dimse", "table", "nnunet", "bids"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {source: folder}", "source"),
        ("data: {source: dicom, folder: x, alias: {}}", "did you mean 'aliases'"),
        ("data: {source: dicom, folder: x, series: {t1: '('}}", "not a regular expression"),
        ("data: {source: nnunet, folder: x, patient: 'P.*'}", "group in parentheses"),
        ("data: {source: dicom, folder: x, aliases: {GTV-1: a, gtv 1: b}}", "leads to two names"),
        ("data: {source: dicom, folder: x, split: {min_patients: 1}}", "min_patients"),
    ],
)
def test_a_mistake_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(text, Site, name="site.yaml")
    assert message in str(caught.value)


def test_a_password_is_not_sent_without_encryption() -> None:
    fields = {"source": "dicomweb", "query": {"modality": "CT"}, "fetch": {"folder": "x"}, "user": "u", "password": "p"}
    with pytest.raises(ValueError, match="https"):
        DicomwebSettings.model_validate(fields | {"url": "http://pacs.example/dicom-web"})
    DicomwebSettings.model_validate(fields | {"url": "http://127.0.0.1:8042/dicom-web"})


def test_a_move_needs_a_port_and_a_get_has_none() -> None:
    fields = {
        "source": "dimse", "host": "h", "pacs_port": 104, "called_ae_title": "P", "query": {"modality": "CT"},
        "fetch": {"folder": "x"},
    }  # fmt: skip
    with pytest.raises(ValueError, match="port must be given"):
        DimseSettings.model_validate(fields | {"retrieve": "move"})
    with pytest.raises(ValueError, match="port must be given"):
        DimseSettings.model_validate(fields | {"port": 11112})


def reasons() -> set[str]:
    """What the readers say when they leave something out; of texts with numbers in them the words."""
    out: set[str] = set()
    for path in (PAGE.parents[1] / "client" / "data").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found: ast.expr | None = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                found = node.args[0] if node.func.id in {"Quarantine", "reading"} else None
            elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
                found = node.slice if node.value.attr == "quarantined" else None
            parts = found.values if isinstance(found, ast.JoinedStr) else [found]
            out |= {part.value.strip() for part in parts if isinstance(part, ast.Constant) and str(part.value).strip()}
    return out


def test_the_page_says_what_to_do_about_every_reason() -> None:
    known = reasons()
    assert len(known) > 90
    page = PAGE.read_text()
    words = page[page.index("## What is left out") : page.index("## What is read")]
    assert sorted(reason for reason in known if reason.partition(":")[0] not in words) == []
