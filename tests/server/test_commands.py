"""``medfl-server``: founding a consortium, reading its configuration, --check, and every way it can be wrong."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from consortium import SITES, found_consortium_folder, with_study
from tiny import classes_study, masks_study

from medfl.server.cli import main
from medfl.server.config import ConsortiumSettings
from medfl.server.coordinator import link_settings, load_studies, read_roster
from medfl.server.founding import found
from medfl.shared.config import load_settings, parse_settings
from medfl.shared.errors import ConfigError
from medfl.shared.study import Study


@pytest.fixture
def root(tmp_path: Path) -> Path:
    found_consortium_folder(tmp_path)
    return tmp_path


def config(root: Path) -> Path:
    return root / "fl" / "consortium.yaml"


def test_the_founded_configuration_loads_and_names_every_site(root: Path) -> None:
    settings = load_settings(config(root), ConsortiumSettings)
    assert tuple(site.name for site in settings.sites) == SITES
    assert all(site.node_key.is_file() for site in settings.sites)
    assert settings.tls.key.is_file()
    assert settings.studies == ()


def test_what_is_said_holds_the_fingerprints_to_compare(tmp_path: Path) -> None:
    said = "\n".join(found_consortium_folder(tmp_path))
    assert "by telephone" in said
    for name in SITES:
        assert name in said
    assert said.count("SHA256:") == 2 * len(SITES)


def test_only_the_owner_can_read_the_consortiums_keys(root: Path) -> None:
    for key in (root / "fl").glob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_consortium_is_not_founded_over_another(root: Path) -> None:
    before = (root / "fl" / "authority.pem").read_bytes()
    requests = [root / name / "keys" / "request.json" for name in SITES]
    with pytest.raises(ConfigError):
        list(found(root / "fl", requests, hosts=["127.0.0.1"], port=1))
    assert (root / "fl" / "authority.pem").read_bytes() == before


def test_a_request_that_was_altered_is_refused_and_nothing_is_made(root: Path) -> None:
    path = root / "north" / "keys" / "request.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"site": "east"}))
    with pytest.raises(ConfigError, match="altered"):
        list(found(root / "other", [path], hosts=["a"], port=1))
    assert not (root / "other").exists()


def test_a_folder_whose_name_cannot_name_a_consortium_is_refused_before_anything_is_made(root: Path) -> None:
    requests = [root / name / "keys" / "request.json" for name in SITES]
    with pytest.raises(ConfigError, match="name"):
        list(found(root / "Our Consortium!", requests, hosts=["a"], port=1))
    assert not (root / "Our Consortium!").exists()


def test_check_tells_the_digest_that_sites_approve(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = classes_study()
    assert main(["--config", str(with_study(root, study)), "--check"]) == 0
    out = capsys.readouterr().out
    assert f"study tiny: {study.digest}" in out
    assert "3 sites, certificate valid for" in out


def status_and_words(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(arguments)
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: config(root).unlink(), "consortium.yaml: cannot be read"),
        (lambda root: config(root).write_text("consortium: [\n"), "consortium.yaml:2:1: "),
        (lambda root: config(root).write_text(config(root).read_text() + "sitess: 1\n"), "(did you mean 'sites'?)"),
        (lambda root: (root / "fl" / "coordinator.key").chmod(0o644), "chmod 600"),
        (lambda root: (root / "fl" / "coordinator.key").unlink(), "coordinator.key"),
        (lambda root: (root / "fl" / "coordinator.pem").write_text("nonsense"), "coordinator.pem"),
        (lambda root: (root / "fl" / "sites" / "north" / "node.key.pub").unlink(), "it is site north's"),
        (lambda root: (root / "fl" / "sites" / "north" / "node.key.pub").write_text("x"), "key"),
        (lambda root: (root / "fl" / "study.json").write_text('{"name": "x"}'), "study.json:1:1: task: is required"),
        (lambda root: (root / "fl" / "study.json").unlink(), "study.json: cannot be read"),
        (
            lambda root: (root / "fl" / "study.json").write_bytes(
                classes_study(rounds={"minimum_sites": 4}).canonical()
            ),
            "rounds.minimum_sites: is 4, and the consortium has 3 sites",
        ),
        (
            lambda root: (root / "fl" / "study.json").write_bytes(
                classes_study(strategy={"name": "krum"}, secure_aggregation={"mode": "msa1"}).canonical()
            ),
            "secure aggregation hides",
        ),
    ],
)
def test_what_is_wrong_ends_with_status_two_and_a_line_that_names_it(
    root: Path, damage: object, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_study(root, classes_study())
    damage(root)  # type: ignore[operator]
    status, err = status_and_words(["--config", str(path), "--check"], capsys)
    assert status == 2, err
    assert words in err
    assert all(line.startswith("medfl-server: ") for line in err.splitlines())


def test_without_a_study_there_is_nothing_to_do(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, err = status_and_words(["--config", str(config(root))], capsys)
    assert status == 2
    assert "set when_done: stay" in err


def test_init_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found_consortium_folder(tmp_path)
    request = str(tmp_path / "north" / "keys" / "request.json")
    others = [str(tmp_path / name / "keys" / "request.json") for name in SITES[1:]]
    status = main(["init", str(tmp_path / "second"), "--host", "fl.example.org", "--request", request, *others])
    assert status == 0, capsys.readouterr().err
    settings = load_settings(tmp_path / "second" / "consortium.yaml", ConsortiumSettings)
    assert settings.listen.port == 9443


def test_sites_must_have_names_of_their_own() -> None:
    text = """
consortium: c
tls: {authority: a, certificate: b, key: c}
state: s
runs: r
sites: [{name: a, node_key: k}, {name: a, node_key: l}]
"""
    with pytest.raises(ConfigError, match="sites must have names that differ"):
        parse_settings(text, ConsortiumSettings, name="c.yaml")


def test_the_link_serves_what_the_configuration_says(root: Path) -> None:
    settings = load_settings(config(root), ConsortiumSettings)
    link = link_settings(settings)
    assert (link.host, link.port) == ("0.0.0.0", 9443)
    assert link.limits.max_body_bytes == 16 * 1024 * 1024
    assert set(read_roster(settings)) == set(SITES)


def test_studies_are_loaded_in_their_order(root: Path) -> None:
    path = with_study(root, classes_study())
    (root / "fl" / "second.yaml").write_bytes(masks_study(name="second").canonical())
    path.write_text(path.read_text().replace("[study.json]", "[study.json, second.yaml]"))
    studies: list[Study] = load_studies(load_settings(path, ConsortiumSettings))
    assert [study.name for study in studies] == ["tiny", "second"]


def test_without_config_the_environment_names_the_consortium_and_else_it_is_here(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MEDFL_CONSORTIUM", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["--check"]) == 2
    assert "no consortium.yaml here: use --config FILE" in capsys.readouterr().err
    monkeypatch.setenv("MEDFL_CONSORTIUM", str(config(root)))
    assert main(["--check"]) == 0
    monkeypatch.delenv("MEDFL_CONSORTIUM")
    monkeypatch.chdir(root / "fl")
    assert main(["--check"]) == 0
