"""``medfl-server``: founding a consortium, reading its configuration, --check, and every way it can be wrong."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import stat
from pathlib import Path

import pytest
from consortium import SITES, found_consortium_folder, with_study
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.torch import save
from sqlalchemy.exc import OperationalError
from tiny import classes_study, masks_study

from medfl.server import config as consortium_config
from medfl.server import link
from medfl.server.cli import main
from medfl.server.config import ConsortiumSettings, load_consortium
from medfl.server.coordinator import link_settings
from medfl.server.enrolling import Registrar
from medfl.server.founding import found
from medfl.server.rosters import RosterFolder
from medfl.server.studies import State, StudyStore
from medfl.server.submission import initial_of, listed_studies
from medfl.shared import chain as chains
from medfl.shared.algorithms.travel import build_study_network
from medfl.shared.audit_log import audit_file
from medfl.shared.certificates import private_bytes
from medfl.shared.config import load_settings
from medfl.shared.errors import ConfigError
from medfl.shared.initial_weights import digest_of
from medfl.shared.keys import create_site_key, load_site_key, write_new
from medfl.shared.passphrase import passphrase
from medfl.shared.signing import Document, sign
from medfl.shared.study import Study


@pytest.fixture
def root(tmp_path: Path) -> Path:
    found_consortium_folder(tmp_path)
    return tmp_path


def config(root: Path) -> Path:
    return root / "fl" / "consortium.yaml"


def test_the_founded_configuration_loads_and_its_roster_names_every_site(root: Path) -> None:
    settings = load_settings(config(root), ConsortiumSettings)
    membership = RosterFolder.of(settings).newest()
    assert tuple(site.name for site in membership.sites) == SITES
    assert settings.tls.key.is_file()
    assert settings.studies == ()


def test_only_the_owner_can_read_the_consortiums_keys(root: Path) -> None:
    for key in (root / "fl").glob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_consortium_is_not_founded_over_another(root: Path) -> None:
    before = (root / "fl" / "authority.pem").read_bytes()
    with pytest.raises(ConfigError, match="holds a consortium already"):
        found(root / "fl", hosts=["127.0.0.1"], port=1)
    assert (root / "fl" / "authority.pem").read_bytes() == before


@pytest.mark.parametrize(
    ("folder", "host", "port", "words"),
    [
        ("Our Consortium!", "a", 1, "cannot name"),
        ("fine", "a b", 1, "cannot|not an address"),
        ("fine", "a", -1, "dial"),
        ("fine", "a", 99999, "ports go from 1 to 65535"),
    ],
)
def test_what_cannot_name_or_reach_a_consortium_is_refused_before_anything_is_made(
    tmp_path: Path, folder: str, host: str, port: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        found(tmp_path / folder, hosts=[host], port=port)
    assert not (tmp_path / folder).exists()


@pytest.mark.parametrize("listen", ["::1", "::", "[::1]", "10.0.0.7"])
def test_a_consortium_that_listens_on_any_address_has_a_configuration_that_loads(tmp_path: Path, listen: str) -> None:
    found(tmp_path / "fl", hosts=["fl.example.org"], port=9443, listen=listen)
    assert load_consortium(tmp_path / "fl" / "consortium.yaml").listen.host == listen.strip("[]")


def test_check_tells_the_digest_that_sites_approve_and_every_fingerprint_that_is_read_over_the_telephone(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = classes_study()
    path = with_study(root, study)
    assert main(["--config", str(path), "--check"]) == 0
    out = capsys.readouterr().out
    registrar = Registrar(load_settings(path, ConsortiumSettings))
    newest = registrar.rosters.newest()
    assert [line.split()[-1] for line in out.splitlines() if "SHA256:" in line] == [
        registrar.fingerprint,
        newest.fingerprint,
        *(site.fingerprint for site in newest.sites),
    ]
    assert [line.split()[0] for line in out.splitlines() if "SHA256:" in line][2:] == list(SITES)
    assert max(map(len, out.splitlines())) <= 80
    assert f"study tiny: {study.digest}" in out
    assert "roster epoch 2, 3 sites" in out
    assert "certificate valid for" in out


def status_and_words(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(arguments)
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: config(root).unlink(), "consortium.yaml: cannot be read"),
        (lambda root: config(root).write_text("consortium: [\n"), "consortium.yaml:2:1: "),
        (lambda root: config(root).write_text(config(root).read_text() + "statee: 1\n"), "(did you mean 'state'?)"),
        (lambda root: (root / "fl" / "coordinator.key").chmod(0o644), "chmod 600"),
        (lambda root: (root / "fl" / "coordinator.key").unlink(), "coordinator.key"),
        (lambda root: (root / "fl" / "coordinator.pem").write_text("nonsense"), "coordinator.pem"),
        (
            lambda root: shutil.copyfile(root / "fl" / "authority.key", root / "fl" / "coordinator.key"),
            "coordinator.key: does not belong to the certificate",
        ),
        (lambda root: (root / "fl" / "revoked.pem").unlink(), "revoked.pem"),
        (lambda root: (root / "fl" / "signing.key").unlink(), "signing.key: cannot be read"),
        (lambda root: [path.unlink() for path in (root / "fl" / "roster").glob("*.json")], "holds no roster"),
        (lambda root: (root / "fl" / "roster" / "2.json").write_text("{}"), "is not a roster that this consortium"),
        (lambda root: (root / "fl" / "signing.key.pub").unlink(), "signing.key.pub"),
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
        (
            lambda root: (root / "fl" / "study.json").write_bytes(
                classes_study(
                    rounds={"minimum_sites": 2, "sites_per_round": 2}, secure_aggregation={"mode": "msa1"}
                ).canonical()
            ),
            "study.json: a round would ask 2 of the consortium's 3 sites",
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


@pytest.mark.parametrize("key", ["coordinator.key", "signing.key"])
def test_check_opens_the_keys_with_the_passphrase_that_a_start_would_have(
    root: Path, key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = root / "passphrase"
    secret.write_text("wrong")
    secret.chmod(0o600)
    monkeypatch.setenv("MEDFL_PASSPHRASE_FILE", str(secret))
    path = with_study(root, classes_study())
    (root / "fl" / key).unlink()
    if key == "signing.key":
        create_site_key(root / "locked.key", passphrase=b"right")
        (root / "locked.key").rename(root / "fl" / key)
    else:
        write_new(root / "fl" / key, private_bytes(ec.generate_private_key(ec.SECP384R1()), b"right"))
    passphrase.cache_clear()
    status, err = status_and_words(["--config", str(path), "--check"], capsys)
    passphrase.cache_clear()
    assert (status, f"{key}: " in err, "does not open with this passphrase" in err) == (2, True, True), err


def test_a_signing_key_that_lies_elsewhere_is_told_where_no_study_needs_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "fl" / "signing.key").unlink()
    assert main(["--config", str(config(root)), "--check"]) == 0
    assert "sites will get no receipts, and no study can be signed: " in capsys.readouterr().out


def test_a_full_disk_ends_the_coordinator_with_a_status_that_is_tried_again_and_a_damaged_audit_log_does_not(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config(root).write_text(config(root).read_text().replace("host: 0.0.0.0, port: 9443", "host: 127.0.0.1, port: 0"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(chains, "write_whole", full)
        status, err = status_and_words(["--config", str(config(root))], capsys)
    assert (status, "No space left on device" in err) == (1, True)
    audit_file(root / "fl" / "state").write_text("nonsense\n")
    status, err = status_and_words(["--config", str(config(root))], capsys)
    assert (status, "row 1 is not as it was written" in err) == (3, True)


@pytest.mark.parametrize(
    "refusal",
    [
        OperationalError("CREATE TABLE", {}, sqlite3.OperationalError("database or disk is full")),
        OSError(errno.ENOSPC, "database or disk is full"),
    ],
)
def test_a_database_that_the_disk_refuses_is_one_line_with_its_file(
    root: Path, refusal: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config(root).write_text(config(root).read_text().replace("host: 0.0.0.0, port: 9443", "host: 127.0.0.1, port: 0"))

    def full(path: Path) -> None:
        raise refusal

    monkeypatch.setattr(link, "FleetState", full)
    status, err = status_and_words(["--config", str(config(root))], capsys)
    assert status == 1
    assert "fleet.db cannot be written (database or disk is full): free disk space" in err.splitlines()[-1]
    assert len(err.splitlines()) == 1


def test_without_a_study_there_is_nothing_to_do(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(root).write_text(config(root).read_text().replace("when_done: stay", "when_done: exit"))
    status, err = status_and_words(["--config", str(config(root))], capsys)
    assert status == 2
    assert "set when_done: stay" in err


def test_init_on_the_command_line_tells_the_fingerprint_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "second"), "--host", "fl.example.org"]) == 0
    settings = load_settings(tmp_path / "second" / "consortium.yaml", ConsortiumSettings)
    assert settings.listen.port == 9443
    out = capsys.readouterr().out
    assert Registrar(settings).fingerprint in out
    assert "[x] 1." in out
    assert out.count("<- next") == 1
    assert max(map(len, out.splitlines())) <= 80 + len(str(tmp_path))


def test_the_link_serves_what_the_configuration_says(root: Path) -> None:
    settings = load_settings(config(root), ConsortiumSettings)
    served = link_settings(settings)
    assert (served.host, served.port) == ("0.0.0.0", 9443)
    assert served.limits.max_body_bytes == 16 * 1024 * 1024


def test_a_command_that_writes_is_not_given_as_root_for_the_folder_of_the_services_account(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(folder: Path) -> None:
        raise ConfigError(f"{folder}: this folder belongs to medfl-server")

    monkeypatch.setattr(consortium_config, "check_owner", another)
    (root / "study.yaml").write_bytes(classes_study().canonical())
    request = str(root / "north" / "keys" / "request.json")
    before = sorted(root.rglob("*"))
    for command in (["submit", str(root / "study.yaml")], ["approve", request], ["revoke", "north"], ["renew"], []):
        status, err = status_and_words(["--config", str(config(root)), *command], capsys)
        assert (status, "belongs to medfl-server" in err) == (2, True), command
    for command in (["--check"], ["list"]):
        assert main(["--config", str(config(root)), *command]) == 0
    assert sorted(root.rglob("*")) == before


def test_studies_are_loaded_in_their_order(root: Path) -> None:
    path = with_study(root, classes_study())
    (root / "fl" / "second.yaml").write_bytes(masks_study(name="second").canonical())
    path.write_text(path.read_text().replace("[study.json]", "[study.json, second.yaml]"))
    studies: list[Study] = listed_studies(load_settings(path, ConsortiumSettings))
    assert [study.name for study in studies] == ["tiny", "second"]


@pytest.mark.parametrize("changes", [{"rounds": {"minimum_sites": 3}}, {"last_day": "2020-01-01"}])
def test_a_listed_study_that_was_submitted_keeps_the_coordinator_from_nothing(
    root: Path, changes: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    study = classes_study(**changes)
    path = with_study(root, study)
    settings = load_consortium(path)
    Registrar(settings).revoke("west")
    assert status_and_words(["--config", str(path), "--check"], capsys)[0] == 2
    signed = sign(load_site_key(settings.trust.signing_key), Document.STUDY, study.canonical())
    store = StudyStore(settings.state)
    store.add(signed)
    for state in (State.WAITING, State.RUNNING, State.ENDED):
        store.mark(study.digest, state, "done")
        assert listed_studies(settings) == [study]
    assert main(["--config", str(path), "--check"]) == 0


def test_a_study_begins_with_the_file_it_names_among_those_of_the_consortium(root: Path) -> None:
    network = build_study_network(classes_study())
    content = save({name: tensor + 1 for name, tensor in network.state_dict().items()})
    study = classes_study(initial_weights=digest_of(content))
    path = with_study(root, study)
    with pytest.raises(ConfigError, match="begins with weights of its own"):
        listed_studies(load_settings(path, ConsortiumSettings))
    (root / "fl" / "other.safetensors").write_bytes(b"another")
    (root / "fl" / "start.safetensors").write_bytes(content)
    path.write_text(path.read_text() + "initial_weights: [other.safetensors, start.safetensors]\n")
    settings = load_settings(path, ConsortiumSettings)
    assert listed_studies(settings) == [study]
    assert initial_of(settings, study) == content


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
