"""``medfl-client``: making keys, reading site.yaml, --check, and every way it can be wrong."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from consortium import found_consortium_folder, write_pictures
from cryptography.hazmat.primitives import serialization
from signer import offer_of
from tiny import masks_study

from medfl.client import checks, config, metrics
from medfl.client.approvals import Approvals, signed_offer
from medfl.client.cli import main
from medfl.client.config import SiteSettings
from medfl.client.metrics import Gauges
from medfl.client.node import Node
from medfl.client.notice import Notice
from medfl.client.policy import Policy
from medfl.client.privacy.ledger import Ceilings, Charge, Ledger, spent_in_total
from medfl.client.runtime import build_site, gate_of, node_settings, site_device
from medfl.shared import command as commands
from medfl.shared.config import load_settings, parse_settings
from medfl.shared.enrolment import read_request
from medfl.shared.errors import ConfigError, NetworkError, PolicyRefusal
from medfl.shared.messages import Kind
from medfl.shared.passphrase import passphrase
from medfl.shared.privacy.accounting import SampledGaussian, epsilon
from medfl.shared.privacy.plan import TrainingPlan
from medfl.shared.privacy.settings import Unit

STUDY = masks_study(data={"preprocessing": {"normalise": "scale_255", "size": [8, 8]}})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site that has everything; its coordinator answers."""
    found_consortium_folder(tmp_path)
    north = tmp_path / "north"
    write_pictures(north / "pictures")
    (north / "study.json").write_bytes(STUDY.canonical())
    write_site(north)
    monkeypatch.setattr(checks, "check_reach", lambda settings: None)
    return north


def write_site(home: Path, **changes: str) -> None:
    keys = {
        "site": "north",
        "coordinator": "127.0.0.1:9443",
        "keys": "keys",
        "state": "state",
        "data": "{source: table, file: pictures/sites.csv}",
        "policy": f"{{studies: [{STUDY.digest}], allow_no_privacy: true, require_secure_aggregation: false}}",
        "device": "cpu",
    } | changes
    (home / "site.yaml").write_text("".join(f"{key}: {value}\n" for key, value in keys.items() if value))


def check(home: Path, capsys: pytest.CaptureFixture[str], *, study: bool = True) -> tuple[int, str, str]:
    arguments = ["--site", str(home / "site.yaml"), "--check"]
    status = main([*arguments, "--study", str(home / "study.json")] if study else arguments)
    out, err = capsys.readouterr()
    return status, " ".join(out.split()), err


def test_check_tells_everything_that_is_well(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = check(home, capsys)
    assert status == 0, err
    for words in ("keys are there", "device: cpu", STUDY.digest, "patients 12", "the policy permits", "reached"):
        assert words in out


def test_a_check_without_a_study_says_that_it_did_not_look_at_the_images(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = check(home, capsys, study=False)
    assert status == 0, err
    assert "images: not looked at" in out
    assert "patients" not in out


def test_an_offered_study_is_checked_and_tried_by_its_name_or_digest(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load_settings(home / "site.yaml", SiteSettings)
    offer = offer_of(STUDY)
    Approvals(settings.policy, home / "state").offer(STUDY, signed_offer(offer.canonical, offer.signature))
    for given in (STUDY.name, STUDY.digest[:8]):
        assert main(["--site", str(home / "site.yaml"), "--check", "--study", given]) == 0
        assert "patients        12" in capsys.readouterr().out
    assert main(["--site", str(home / "site.yaml"), "--dry-run", "--study", STUDY.name]) == 0
    assert "Nothing was sent." in capsys.readouterr().out
    assert main(["--site", str(home / "site.yaml"), "--check", "--study", "another"]) == 2
    assert "no study here is called another" in capsys.readouterr().err


def spend(home: Path) -> Path:
    """A ledger with a plan and two charges; its path."""
    path = home / "state" / "ledger.jsonl"
    plan = TrainingPlan(Unit.PATIENT, 8.0, 1e-5, 1.0, 4.0, 0.5, 8.0, 1)
    with Ledger(path, cohort="north", ceilings=Ceilings(8.0, 8.0)) as ledger:
        ledger.fix_plan(STUDY.digest, plan, patients=100)
        for number in (1, 2):
            ledger.charge(Charge(STUDY.digest, number, f"training {number}", plan.round_cost))
    return path


def test_check_tells_what_is_spent(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = spend(home)
    write_site(home, policy="{max_epsilon_total: 8}")
    _, out, _ = check(home, capsys, study=False)
    both = epsilon(2 * [SampledGaussian(4.0, 0.5, 1)], 1e-5)
    assert f"privacy: epsilon {both:.3f} of 8 is spent; the ledger is whole" in out
    assert path.exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b'"round":1', b'"round":7')),
            "row 3 is not as it was",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), ""),
        (lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:2])), "it has 2 whole rows"),
        (lambda path: path.write_bytes(b""), "it has 0 whole rows"),
        (lambda path: path.unlink(), "it has 0 whole rows"),
        (lambda path: path.with_name("ledger.jsonl.head").unlink(), "lost rows could not be noticed"),
    ],
    ids=["edited", "last row torn", "truncated", "emptied", "deleted", "announcement deleted"],
)
def test_a_damaged_ledger_is_named_by_the_check_and_keeps_the_node_from_starting(
    home: Path, capsys: pytest.CaptureFixture[str], damage: Any, words: str
) -> None:
    path = spend(home)
    damage(path)
    if not words:  # the announcement completes it: nothing is lost
        assert check(home, capsys, study=False)[0] == 0
        return
    left = path.read_bytes() if path.exists() else b""
    for command in (["--check"], []):
        assert main(["--site", str(home / "site.yaml"), *command]) == 3
        err = capsys.readouterr().err
        assert words in " ".join(err.split())
        assert "newest backup" in err
    assert (path.read_bytes() if path.exists() else b"") == left  # evidence


def test_a_command_that_writes_is_not_given_as_root_for_the_state_of_the_nodes_account(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(folder: Path) -> None:
        raise ConfigError(f"{folder}: this folder belongs to medfl")

    monkeypatch.setattr(config, "check_owner", another)
    decided = ["--by", "Dr A. Example"]
    for command in (["approve", STUDY.name, *decided], ["withdraw", STUDY.name, *decided], ["roster", "confirm"], []):
        assert main(["--site", str(home / "site.yaml"), *command]) == 2
        assert "belongs to medfl" in capsys.readouterr().err
    assert check(home, capsys)[0] == 0


def test_a_node_that_starts_tells_at_once_what_its_ledger_says_is_spent(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Gauges] = []

    class Seen(Gauges):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(metrics, "Gauges", Seen)
    monkeypatch.setattr(commands, "on_termination", lambda stop: None)
    monkeypatch.setattr(Node, "run", lambda node: None)
    path = spend(home)
    write_site(home, metrics="{port: 0}")
    assert main(["--site", str(home / "site.yaml")]) == 0
    spent = made[0].registry.get_sample_value("medfl_epsilon_total")
    assert spent == pytest.approx(spent_in_total(path, Ceilings(8.0, 8.0)))
    assert spent > 0


def test_a_ledger_that_another_node_has_open_keeps_this_one_from_starting(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Ledger(spend(home), cohort="north", ceilings=Ceilings(8.0, 8.0)):
        assert main(["--site", str(home / "site.yaml")]) == 3
    assert "in use by another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "status", "words"),
    [
        (lambda home: (home / "site.yaml").unlink(), 2, "site.yaml: cannot be read"),
        (lambda home: write_site(home, policyy="{}"), 2, "(did you mean 'policy'?)"),
        (lambda home: write_site(home, coordinator="nowhere"), 2, "site.yaml:2:1: coordinator: write host:port"),
        (lambda home: write_site(home, coordinator="a:99999"), 2, "with a port from 1 to 65535"),
        (lambda home: write_site(home, policy="{allow_no_privacy: yes}"), 2, "policy.allow_no_privacy: "),
        (lambda home: write_site(home, site="south"), 2, "is for site north, and this is site south"),
        (lambda home: (home / "keys" / "node.key").unlink(), 2, "node.key"),
        (lambda home: (home / "keys" / "node.key").chmod(0o644), 2, "chmod 600"),
        (lambda home: (home / "keys" / "client.pem").unlink(), 2, "client.pem"),
        (lambda home: (home / "keys" / "client.pem").write_text("nonsense"), 2, "client.pem"),
        (lambda home: write_site(home, data="{source: table, file: absent.csv}"), 4, "absent.csv"),
        (lambda home: (home / "pictures" / "sites.csv").write_text("patient,image,mask\n"), 4, "has no rows"),
        (lambda home: [p.unlink() for p in (home / "pictures").glob("m*.png")], 4, "no case"),
        (lambda home: [p.write_bytes(b"no picture") for p in (home / "pictures").glob("p*.png")], 4, "left out: "),
        (
            lambda home: write_site(home, policy=""),
            3,
            "is not approved here: read it with",
        ),
        (lambda home: write_site(home, policy=f"{{studies: [{STUDY.digest}]}}"), 3, "require_secure_aggregation"),
    ],
)
def test_what_is_wrong_ends_with_its_status_and_one_line_that_names_it(
    home: Path, damage: Any, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(home)
    got, _, err = check(home, capsys)
    assert (got, words in err) == (status, True), err
    assert err.startswith("medfl-client: ")
    assert len(err.splitlines()) == 1


def test_a_coordinator_that_cannot_be_reached_ends_with_status_five(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_reach(settings: object) -> None:
        raise NetworkError("coordinator 127.0.0.1:9443 cannot be reached: is it running?")

    monkeypatch.setattr(checks, "check_reach", out_of_reach)
    assert check(home, capsys, study=False)[0] == 5


def test_no_error_names_a_patient_or_a_patients_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for picture in (home / "pictures").glob("p*.png"):
        picture.write_bytes(b"no picture")
    _, out, err = check(home, capsys)
    assert "P3" not in out + err
    assert "p3.png" not in out + err


def enroll(folder: Path, *more: str) -> int:
    return main(["--site", str(folder / "site.yaml"), "enroll", *more])


def test_enrolling_writes_a_site_file_keys_for_the_owner_only_and_a_public_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert enroll(tmp_path, "--name", "north", "--coordinator", "fl.example.org:9443") == 0
    out = capsys.readouterr().out
    request = read_request(tmp_path / "keys" / "request.json")
    assert request.fingerprint in out
    assert "[x] 2." in out
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "keys").iterdir()}
    assert {name for name, mode in modes.items() if mode & 0o077} == {"request.json", "node.key.pub", "site.key.pub"}
    assert "PRIVATE" not in (tmp_path / "keys" / "request.json").read_text()
    settings = load_settings(tmp_path / "site.yaml", SiteSettings)
    assert (settings.site, settings.coordinator) == ("north", "fl.example.org:9443")
    assert settings.policy == Policy()


def test_enrolling_again_keeps_the_keys_and_makes_what_a_killed_command_did_not(tmp_path: Path) -> None:
    assert enroll(tmp_path, "--name", "north") == 0
    before = {name: (tmp_path / "keys" / name).read_bytes() for name in ("node.key", "site.key")}
    (tmp_path / "keys" / "client.key").unlink()
    (tmp_path / "keys" / "request.json").unlink()
    assert enroll(tmp_path) == 0
    assert before == {name: (tmp_path / "keys" / name).read_bytes() for name in before}
    assert read_request(tmp_path / "keys" / "request.json").site == "north"
    assert enroll(tmp_path, "--name", "south") == 2


def test_keys_made_with_a_passphrase_open_only_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passphrase.cache_clear()
    secret = tmp_path / "secret"
    secret.write_text("correct horse\n")
    secret.chmod(0o600)
    monkeypatch.setenv("MEDFL_PASSPHRASE_FILE", str(secret))
    assert enroll(tmp_path, "--name", "north", "--passphrase") == 0
    for name in ("client.key", "node.key", "site.key"):
        content = (tmp_path / "keys" / name).read_bytes()
        openssh = b"OPENSSH" in content
        with pytest.raises(TypeError):
            (serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key)(content, None)
    passphrase.cache_clear()
    secret.write_text("wrong")
    assert enroll(tmp_path) == 2
    passphrase.cache_clear()


@pytest.mark.parametrize("arguments", [[], ["--name", "Not A Name"], ["--name", "../north"], ["--name", "a" * 70]])
def test_without_a_site_file_and_a_sound_name_no_key_is_made(tmp_path: Path, arguments: list[str]) -> None:
    assert enroll(tmp_path, *arguments) == 2
    assert list(tmp_path.iterdir()) == []


MINIMAL = "site: a\ncoordinator: {}\nkeys: k\nstate: s\ndata: {{source: dicom, folder: d}}\n"


@pytest.mark.parametrize("address", ["fl.example.org:9443", "10.0.0.1:1", "'[::1]:9443'", "host:1"])
def test_an_address_is_host_and_port(address: str) -> None:
    parse_settings(MINIMAL.format(address), SiteSettings, name="f")


@pytest.mark.parametrize("address", ["fl.example.org", "https://fl.example.org:9443", "a b:1", "':9443'", "a:123456"])
def test_anything_else_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"f:2:1: coordinator: "):
        parse_settings(MINIMAL.format(address), SiteSettings, name="f")


def test_without_a_policy_nothing_is_allowed() -> None:
    settings = parse_settings(MINIMAL.format("a:1"), SiteSettings, name="f")
    assert settings.policy == Policy()
    assert settings.policy.studies == ()
    assert settings.policy.require_secure_aggregation
    assert not settings.policy.allow_no_privacy
    assert not settings.policy.release_site_metrics


def notice(kind: Kind, digest: str) -> Notice:
    return Notice(kind.value, "1", "tiny", digest, 1, 1)


def test_the_gate_lets_offers_in_and_of_the_rest_only_what_is_approved() -> None:
    gate = gate_of(Approvals(Policy(studies=(STUDY.digest,))))
    gate(notice(Kind.OFFER, "0" * 64))
    for kind in (kind for kind in Kind if kind is not Kind.OFFER):
        gate(notice(kind, STUDY.digest))
        with pytest.raises(PolicyRefusal) as caught:
            gate(notice(kind, "0" * 64))
        assert caught.value.reason == "study not approved"


def test_a_device_that_is_not_there_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = load_settings(home / "site.yaml", SiteSettings)
    assert site_device(settings).type == "cpu"
    assert site_device(settings.model_copy(update={"device": "auto"})).type == "cpu"
    with pytest.raises(ConfigError, match="device: cuda was asked for"):
        site_device(settings.model_copy(update={"device": "cuda"}))


def test_a_state_folder_that_cannot_be_used_is_a_configuration_error(home: Path) -> None:
    (home / "file").write_text("")
    write_site(home, state="file/state")
    with pytest.raises(ConfigError, match="state: "):
        build_site(load_settings(home / "site.yaml", SiteSettings), Approvals(Policy()))


def test_the_nodes_state_and_keys_are_where_the_file_says(home: Path) -> None:
    settings = node_settings(load_settings(home / "site.yaml", SiteSettings))
    assert settings.state_dir == home / "state"
    assert settings.fleet.transport.coordinator == "127.0.0.1:9443"
    assert settings.fleet.transport.key.parent == home / "keys"
