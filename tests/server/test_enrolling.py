"""Approve, revoke, renew: each change one signed epoch, and the same command again does no harm."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography import x509

from medfl.server import enrolling
from medfl.server.cli import main
from medfl.server.config import load_consortium
from medfl.server.enrolling import Registrar
from medfl.server.founding import found
from medfl.shared.certificates import common_name, hosts_of, load_certificate, revoked_serials, signed_by
from medfl.shared.enrolment import Invitation, Request, make_keys
from medfl.shared.errors import ConfigError


@pytest.fixture
def registrar(tmp_path: Path) -> Registrar:
    found(tmp_path / "fl", hosts=["fl.example.org"], port=9443)
    return Registrar(load_consortium(tmp_path / "fl" / "consortium.yaml"))


def request(root: Path, site: str, keys: str = "keys") -> Request:
    return make_keys(root / site / keys, site)


def revoked(root: Path) -> set[int]:
    return revoked_serials(root / "fl" / "revoked.pem")


def issued(root: Path, site: str) -> set[int]:
    found = (root / "fl" / "certificates").glob(f"{site}-*.pem")
    return {load_certificate(path).serial_number for path in found}


def test_several_requests_make_one_epoch_and_each_gets_an_invitation(registrar: Registrar, tmp_path: Path) -> None:
    approved = registrar.approve([request(tmp_path, name) for name in ("north", "south", "west")])
    assert [(outcome.site, outcome.what) for outcome in approved] == [
        ("north", "new"),
        ("south", "new"),
        ("west", "new"),
    ]
    newest = registrar.rosters.newest()
    assert (newest.epoch, newest.floor) == (2, 1)
    assert [(site.id, site.name) for site in newest.sites] == [(1, "north"), (2, "south"), (3, "west")]
    for outcome in approved:
        invitation = Invitation.read(outcome.invitation)
        assert invitation.fingerprint == registrar.fingerprint
        assert common_name(invitation.certificate) == outcome.site
        assert signed_by(invitation.certificate, invitation.authority)


def test_a_request_that_is_approved_again_gets_a_certificate_and_no_new_epoch(
    registrar: Registrar, tmp_path: Path
) -> None:
    north = request(tmp_path, "north")
    first, again = registrar.approve([north])[0], registrar.approve([north])[0]
    assert (again.what, registrar.rosters.newest_epoch) == ("known", 2)
    assert first.invitation == again.invitation


def test_a_lost_key_is_replaced_under_the_same_id_and_the_old_certificate_revoked(
    registrar: Registrar, tmp_path: Path
) -> None:
    (first,) = registrar.approve([request(tmp_path, "north")])
    old = Invitation.read(first.invitation).certificate
    registrar.approve([request(tmp_path, "south")])
    (second,) = registrar.approve([request(tmp_path, "north", "new-keys")])
    assert second.what == "replaced"
    newest = registrar.rosters.newest()
    assert (newest.epoch, newest.floor) == (4, 4)  # nothing before it may be summed under
    assert newest.by_name["north"].id == 1
    assert revoked(tmp_path) == {old.serial_number}
    assert Invitation.read(second.invitation).certificate.serial_number not in revoked(tmp_path)


def test_a_revoked_site_is_gone_and_neither_its_id_nor_its_certificate_comes_back(
    registrar: Registrar, tmp_path: Path
) -> None:
    registrar.approve([request(tmp_path, name) for name in ("north", "south")])
    after = registrar.revoke("south")
    assert (after.epoch, after.floor, [site.name for site in after.sites]) == (3, 3, ["north"])
    registrar.approve([request(tmp_path, "west")])
    assert registrar.rosters.newest().by_name["west"].id == 3
    assert revoked(tmp_path) == issued(tmp_path, "south")
    with pytest.raises(ConfigError, match="has no site south: its sites are north, west"):
        registrar.revoke("south")


def test_the_list_of_revoked_certificates_is_signed_by_the_authority(registrar: Registrar, tmp_path: Path) -> None:
    listed = x509.load_pem_x509_crl((tmp_path / "fl" / "revoked.pem").read_bytes())
    assert listed.is_signature_valid(load_certificate(tmp_path / "fl" / "authority.pem").public_key())  # type: ignore[arg-type]


@pytest.mark.parametrize("twin", ["site.key", "node.key"])
def test_two_sites_do_not_share_a_key(registrar: Registrar, tmp_path: Path, twin: str) -> None:
    registrar.approve([request(tmp_path, "north")])
    (tmp_path / "south" / "keys").mkdir(parents=True)
    for name in (twin, f"{twin}.pub"):
        shutil.copy(tmp_path / "north" / "keys" / name, tmp_path / "south" / "keys")
    with pytest.raises(ConfigError, match="same keys as south"):
        registrar.approve([request(tmp_path, "south")])
    assert registrar.rosters.newest_epoch == 2


def test_the_signing_key_alone_revokes_although_the_authority_is_offline(registrar: Registrar, tmp_path: Path) -> None:
    registrar.approve([request(tmp_path, "north")])
    (tmp_path / "fl" / "authority.key").unlink()
    for _ in range(2):  # given again, it still says what is to be done
        with pytest.raises(
            ConfigError, match=r"north is out of the consortium \(roster epoch 3\).* not on the list.*authority\.key"
        ):
            registrar.revoke("north")
        assert registrar.rosters.newest().sites == ()  # cut off all the same
    with pytest.raises(ConfigError, match=r"authority\.key"):
        registrar.approve([request(tmp_path, "south")])
    assert registrar.rosters.newest_epoch == 3


def revoke_while_the_authority_is_offline(root: Path, registrar: Registrar, site: str) -> None:
    offline = (root / "fl" / "authority.key").rename(root / "offline.key")
    with pytest.raises(ConfigError, match="not on the list"):
        registrar.revoke(site)
    offline.rename(root / "fl" / "authority.key")
    assert revoked(root) == set()


def test_revoke_given_again_puts_on_the_list_what_it_could_not_before(registrar: Registrar, tmp_path: Path) -> None:
    registrar.approve([request(tmp_path, name) for name in ("north", "south")])
    revoke_while_the_authority_is_offline(tmp_path, registrar, "north")
    assert registrar.revoke("north").epoch == 3
    assert revoked(tmp_path) == issued(tmp_path, "north")
    with pytest.raises(ConfigError, match="has no site north"):
        registrar.revoke("north")


@pytest.mark.parametrize("site", ["west", "north"])
def test_the_next_approve_puts_on_the_list_what_a_revoke_could_not(
    registrar: Registrar, tmp_path: Path, site: str
) -> None:
    registrar.approve([request(tmp_path, name) for name in ("north", "south")])
    old = issued(tmp_path, "north")
    revoke_while_the_authority_is_offline(tmp_path, registrar, "north")
    registrar.approve([request(tmp_path, site, "new-keys")])
    assert revoked(tmp_path) == old


def test_an_approve_that_was_killed_after_its_roster_still_revokes_the_old_certificate_when_given_again(
    registrar: Registrar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registrar.approve([request(tmp_path, name) for name in ("north", "south")])
    old, new = issued(tmp_path, "north"), request(tmp_path, "north", "new-keys")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(enrolling, "revocation_list", killed)
    with pytest.raises(KeyboardInterrupt):
        registrar.approve([new])
    monkeypatch.undo()
    assert registrar.approve([new])[0].what == "known"
    assert revoked(tmp_path) == old


def test_two_requests_of_one_command_with_one_node_key_are_told_in_words(registrar: Registrar, tmp_path: Path) -> None:
    north = request(tmp_path, "north")
    (tmp_path / "south" / "keys").mkdir(parents=True)
    shutil.copy(tmp_path / "north" / "keys" / "node.key", tmp_path / "south" / "keys")
    with pytest.raises(ConfigError, match="the roster of epoch 2 cannot be made: two sites have the same node key"):
        registrar.approve([north, request(tmp_path, "south")])
    assert registrar.rosters.newest_epoch == 1


def test_a_move_is_a_new_epoch_and_a_renewal_is_not(registrar: Registrar, tmp_path: Path) -> None:
    certificate = tmp_path / "fl" / "coordinator.pem"
    before = load_certificate(certificate)
    registrar.renew_server((), None)
    assert registrar.rosters.newest_epoch == 1
    assert load_certificate(certificate).serial_number != before.serial_number
    assert load_certificate(certificate).public_key() == before.public_key()
    registrar.renew_server(["new.example.org", "10.0.0.7"], 443)
    newest = registrar.rosters.newest()
    assert (newest.epoch, newest.floor, newest.coordinator) == (2, 1, "new.example.org:443")
    assert hosts_of(load_certificate(certificate)) == ["new.example.org", "10.0.0.7"]


def approve(root: Path, *more: str) -> int:
    config = str(root / "fl" / "consortium.yaml")
    return main(["--config", config, "approve", str(root / "north" / "keys" / "request.json"), *more])


def test_approve_shows_the_fingerprint_and_does_nothing_without_a_yes(
    registrar: Registrar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    north = request(tmp_path, "north")
    for answer, status, epoch in (("no", 3, 1), ("yes", 0, 2)):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert approve(tmp_path) == status
        assert registrar.rosters.newest_epoch == epoch
        assert north.fingerprint in capsys.readouterr().out


def test_approve_takes_fingerprints_heard_by_telephone_and_no_others(
    registrar: Registrar, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    north = request(tmp_path, "north")
    assert approve(tmp_path, "--fingerprint", "SHA256:another") == 3
    assert "site north has none of the fingerprints given" in capsys.readouterr().err
    assert registrar.rosters.newest_epoch == 1
    assert approve(tmp_path, "--fingerprint", "SHA256:another", north.fingerprint) == 0
    assert "[x] 3." in capsys.readouterr().out


def test_revoke_and_renew_on_the_command_line(
    registrar: Registrar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registrar.approve([request(tmp_path, "north")])
    monkeypatch.setenv("MEDFL_CONSORTIUM", str(tmp_path / "fl" / "consortium.yaml"))
    assert main(["revoke", "south"]) == 2
    assert main(["revoke", "north"]) == 0
    assert main(["renew", "--host", "new.example.org"]) == 0
    assert "sites dial new.example.org:9443 (roster epoch 4)" in capsys.readouterr().out


def test_a_port_that_nobody_can_dial_is_not_signed_and_one_that_nobody_listens_on_is_told(
    registrar: Registrar, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tmp_path / "fl" / "consortium.yaml")
    for wrong in (["--port", "99999"], ["--port", "0"], ["--host", "a b"]):
        assert main(["--config", config, "renew", *wrong]) == 2
        err = capsys.readouterr().err
        assert "write host:port, for example fl.example.org:9443, with a port from 1 to 65535" in err
    assert registrar.rosters.newest_epoch == 1
    assert main(["--config", config, "renew"]) == 0
    assert "listens on" not in capsys.readouterr().out
    assert main(["--config", config, "renew", "--port", "19555"]) == 0
    assert "consortium.yaml listens on port 9443: change listen.port to 19555" in capsys.readouterr().out


def test_two_commands_do_not_change_the_roster_at_once(registrar: Registrar, tmp_path: Path) -> None:
    words = "another approve, revoke or renew is being given here: wait for it"
    with registrar.alone(), pytest.raises(ConfigError, match=words), registrar.alone():
        pass


def test_a_site_can_be_revoked_while_somebody_telephones_and_what_was_shown_counts_no_longer(
    registrar: Registrar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registrar.approve([request(tmp_path, "north"), request(tmp_path, "south")])
    config = str(tmp_path / "fl" / "consortium.yaml")

    def yes_after(site: str) -> None:
        def answer(_: str) -> str:
            assert main(["--config", config, "revoke", site]) == 0
            return "yes"

        monkeypatch.setattr("builtins.input", answer)

    yes_after("north")
    assert approve(tmp_path) == 2
    assert "has changed since site north was shown: nothing was approved" in capsys.readouterr().err
    assert set(registrar.rosters.newest().by_name) == {"south"}
    yes_after("south")
    assert approve(tmp_path) == 0
    assert set(registrar.rosters.newest().by_name) == {"north"}
