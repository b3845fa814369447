from __future__ import annotations

import contextlib
import datetime
import math
import os
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field, StrictBool

from medfl.shared.config import LocalPath, Settings, load_settings, parse_settings
from medfl.shared.errors import ConfigError


class Disk(Settings):
    kind: Literal["disk"]
    folder: LocalPath


class Network(Settings):
    kind: Literal["network"]
    host: str
    port: int = Field(default=80, ge=0, le=65535)


class Inner(Settings):
    learning_rate: float = 0.1
    country: str = ""


class Example(Settings):
    name: str = "x"
    sure: StrictBool = False
    secret: str = ""
    store: Annotated[Disk | Network, Field(discriminator="kind")] | None = None
    inner: Inner = Inner()
    items: tuple[Inner, ...] = ()
    path: LocalPath | None = None
    day: datetime.date | None = None
    number: float = 0.0


def parse(text: str, **more: object) -> Example:
    return parse_settings(text, Example, name="f.yaml", **more)  # type: ignore[arg-type]


def problems(text: str, **more: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, **more)
    return str(caught.value).splitlines()


def test_an_unknown_key_is_told_with_line_column_and_the_name_that_was_meant() -> None:
    text = "name: a\ninner:\n  learning_rat: 1\n"
    assert problems(text) == ["f.yaml:3:3: inner.learning_rat: unknown key (did you mean 'learning_rate'?)"]


def test_an_unknown_key_that_is_like_no_other_gets_no_suggestion() -> None:
    assert problems("zzzzzz: 1") == ["f.yaml:1:1: zzzzzz: unknown key"]


def test_a_mistake_in_a_list_item_is_told_with_its_index_and_its_key_is_suggested() -> None:
    text = "items:\n  - country: a\n  - countr: b\n"
    assert problems(text) == ["f.yaml:3:5: items.1.countr: unknown key (did you mean 'country'?)"]


def test_every_mistake_is_told_not_only_the_first() -> None:
    lines = problems("name: [1]\nsure: maybe\ninner: {learning_rate: fast}\n")
    assert [line.split(": ")[0] for line in lines] == ["f.yaml:1:1", "f.yaml:2:1", "f.yaml:3:9"]


def test_a_required_key_that_is_missing_is_named_at_the_section_that_lacks_it() -> None:
    assert problems("store:\n  kind: network\n") == ["f.yaml:1:1: store.host: is required"]


def test_the_tag_of_a_union_is_not_part_of_the_key() -> None:
    text = "store:\n  kind: network\n  host: a\n  port: 99999\n"
    (line,) = problems(text)
    assert line.startswith("f.yaml:4:3: store.port: input should be less than or equal to 65535")


def test_a_key_of_the_other_kind_of_a_union_is_unknown() -> None:
    text = "store: {kind: network, host: a, folder: b}"
    assert problems(text)[0].startswith("f.yaml:1:33: store.folder: unknown key")


def test_an_unknown_kind_names_the_kinds_there_are() -> None:
    (line,) = problems("store: {kind: tape}")
    assert line.startswith("f.yaml:1:1: store")
    assert "'disk'" in line
    assert "'network'" in line


def test_a_key_given_twice_is_refused_with_both_lines() -> None:
    assert problems("name: a\nsure: true\nname: b\n") == ["f.yaml:3:1: name: is given twice (first at line 1)"]


def test_a_key_given_twice_in_a_section_is_refused() -> None:
    assert problems("inner:\n  country: a\n  country: b\n") == ["f.yaml:3:3: country: is given twice (first at line 2)"]


def test_no_is_norway_and_not_false() -> None:
    assert parse("inner: {country: no}").inner.country == "no"


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "1", "'true'"])
def test_only_true_and_false_are_booleans(word: str) -> None:
    assert problems(f"sure: {word}")[0].startswith("f.yaml:1:1: sure: ")
    assert parse("sure: true").sure is True


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("4E3", 4000.0), (".5", 0.5), ("-2.", -2.0), ("3", 3.0)])
def test_numbers_are_read_as_yaml_1_2_reads_them(text: str, value: float) -> None:
    assert parse(f"number: {text}").number == value


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e999"])
def test_a_number_must_be_finite(text: str) -> None:
    assert problems(f"number: {text}")[0].startswith("f.yaml:1:1: number: ")


def test_a_date_is_a_date() -> None:
    assert parse("day: 2027-03-01").day == datetime.date(2027, 3, 1)


def test_a_value_in_the_environment_is_taken_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDFL_TEST_VALUE", "from outside")
    assert parse("secret: ${MEDFL_TEST_VALUE}").secret == "from outside"


def test_a_missing_environment_variable_is_named_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDFL_TEST_VALUE", raising=False)
    text = "name: a\nitems:\n  - country: ${MEDFL_TEST_VALUE}\n"
    assert problems(text) == [
        "f.yaml:3:5: items.0.country: environment variable MEDFL_TEST_VALUE is not set: export it"
    ]


def secret_file(folder: Path, mode: int = 0o600, content: bytes = b"hunter2\n") -> Path:
    path = folder / "secret.txt"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_secret_is_read_from_a_file_beside_the_configuration(tmp_path: Path) -> None:
    secret_file(tmp_path)
    assert parse("secret: file:secret.txt", folder=tmp_path).secret == "hunter2"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_secret_that_others_can_open_is_refused_and_not_echoed(tmp_path: Path, mode: int) -> None:
    secret_file(tmp_path, mode)
    (line,) = problems("secret: file:secret.txt", folder=tmp_path)
    assert "chmod 600" in line
    assert line.startswith("f.yaml:1:1: secret: ")
    assert "hunter2" not in line


def test_systemd_credentials_come_before_the_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "credentials").mkdir()
    secret_file(tmp_path, content=b"old")
    secret_file(tmp_path / "credentials", content=b"new")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    assert parse("secret: file:secret.txt", folder=tmp_path).secret == "new"


@pytest.mark.parametrize("reference", ["file:absent", '"file:a\\0b"', "file:."])
def test_a_secret_that_cannot_be_read_is_a_clear_error(tmp_path: Path, reference: str) -> None:
    (line,) = problems(f"secret: {reference}", folder=tmp_path)
    assert "cannot be read" in line or "can be read by others" in line


def test_a_secret_that_is_not_text_is_a_clear_error(tmp_path: Path) -> None:
    secret_file(tmp_path, content=b"\xff\xfe")
    assert "cannot be read" in problems("secret: file:secret.txt", folder=tmp_path)[0]


@pytest.mark.parametrize("field", ["sure", "number", "store", "items", "inner", "day"])
def test_no_value_is_ever_echoed(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDFL_TEST_VALUE", "hunter2")
    assert "hunter2" not in "".join(problems(f"{field}: ${{MEDFL_TEST_VALUE}}"))


def test_a_relative_path_counts_from_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("path: ../there/x")
    assert load_settings(tmp_path / "f.yaml", Example).path == tmp_path.parent / "there/x"


def test_an_absolute_path_stays_and_variables_in_paths_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDFL_TEST_VALUE", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("path: /x", folder=tmp_path).path == Path("/x")
    assert parse("path: $MEDFL_TEST_VALUE/a", folder=tmp_path).path == Path("/data/a")
    assert parse("path: ~/a", folder=tmp_path).path == Path("/home/me/a")


def test_an_unset_variable_in_a_path_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDFL_TEST_VALUE", raising=False)
    assert problems("path: $MEDFL_TEST_VALUE/a") == [
        "f.yaml:1:1: path: environment variable MEDFL_TEST_VALUE is not set: export it, or write the path itself"
    ]


def test_the_home_of_a_user_who_does_not_exist_is_a_clear_error() -> None:
    assert problems("path: ~nobody-of-that-name/a")[0].startswith("f.yaml:1:1: path: ")


def test_overrides_replace_keys_of_the_file() -> None:
    assert parse("name: a", overrides={"name": "b"}).name == "b"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse("name: a").name = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "f.yaml: is empty"),
        ("- a\n", "f.yaml:1:1: must be a mapping of keys to values"),
        ("a: b: c\n", "f.yaml:1:5: mapping values are not allowed here"),
        ("name: !!python/object:os.system x\n", "f.yaml:1:7: could not determine a constructor"),
    ],
)
def test_text_that_is_no_configuration_is_told_where(text: str, expected: str) -> None:
    assert problems(text)[0].startswith(expected)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_settings(path, Example)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_settings(tmp_path / "latin.yaml", Example)


PIECES = [
    *("name", "inner", "items", "path", "number", ": ", "\n", "  ", "- ", "[", "]", "{", "}", "? ", "#", "|", "%"),
    *("&a", "*a", "<<", "!!int", "!!float", "!!bool", "!!timestamp", "!!binary", "!!set", "''", '"', "\\0"),
    *("~", "1", ".inf", "0x", "1:99", "2020-99-99", "file:", "${X}"),
]
yaml_like = st.one_of(
    st.text(max_size=80),
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
)


@given(yaml_like)
@example("name: !!int ''")
@example("name: !!float ''")
@example("name: !!bool x")
@example("name: !!timestamp x")
@example("items: &a [*a]")
@example("inner: &a {country: *a}")
@example("[" * 5000)
@example("number: " + "1" * 5000)
@example("? [a]\n: b")
@example("1: 2\ntrue: 3")
@example("&a a: &b [&c [&d [&e [*e,*e],*d],*c],*b]")
def test_arbitrary_text_gives_settings_or_a_configuration_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert math.isfinite(parse(text, folder=Path(os.devnull)).number)


@given(st.integers(0, 20), st.integers(0, 8))
def test_the_position_is_that_of_the_key(lines: int, indent: int) -> None:
    text = "# a comment\n" * lines + "inner:\n" + " " * (indent + 1) + "typo: 1\n"
    assert re.match(rf"f\.yaml:{lines + 2}:{indent + 2}: inner\.typo: ", problems(text)[0])
