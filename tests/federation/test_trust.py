"""Rosters, certificates and clocks between a running coordinator and its sites, over real TLS on loopback."""

from __future__ import annotations

import errno
import logging
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from certified import load_authority
from consortium import found_consortium_folder, site_settings
from cryptography import x509
from federation import echo, let_in, until
from tiny import classes_study

from medfl.client.audit import Audit
from medfl.client.checkin import CheckIns
from medfl.client.config import SiteSettings
from medfl.client.fleet import Fleet
from medfl.client.joining import join
from medfl.client.node import Node
from medfl.client.runtime import check_ins, node_settings
from medfl.client.transport import Kind, LinkTrouble
from medfl.client.trust import coordinator_address, site_rosters
from medfl.client.work import Work
from medfl.server.audit import Audit as CoordinatorsAudit
from medfl.server.config import ConsortiumSettings, load_consortium
from medfl.server.coordinator import link_settings
from medfl.server.doorkeeper import Doorkeeper
from medfl.server.enrolling import Registrar
from medfl.server.link import Link
from medfl.server.studies import State, StudyStore
from medfl.shared import checkin
from medfl.shared.audit_log import audit_file
from medfl.shared.certificates import (
    SiteFiles,
    days_left,
    issue_client_certificate,
    load_certificate,
)
from medfl.shared.chain import inspect
from medfl.shared.enrolment import Invitation, make_keys, make_request
from medfl.shared.keys import load_site_key
from medfl.shared.passphrase import passphrase
from medfl.shared.signing import Document, sign
from medfl.simulations.demo import free_port


class World:
    """A coordinator that serves, and its sites' folders; the sites' connections are made one by one."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root, self.stack = root, stack
        self.fingerprint = found_consortium_folder(root)
        config = root / "fl" / "consortium.yaml"
        config.write_text(config.read_text().replace("host: 0.0.0.0, port: 9443", "host: 127.0.0.1, port: 0"))
        self.settings: ConsortiumSettings = load_consortium(config)
        self.registrar = Registrar(self.settings)
        self.link = stack.enter_context(Link(link_settings(self.settings)))
        self.audit = CoordinatorsAudit(audit_file(self.settings.state))
        stack.callback(self.audit.close)
        self.door = stack.enter_context(Doorkeeper(self.settings, self.link, self.audit))

    def site(self, name: str) -> SiteSettings:
        return site_settings(self.root, name).model_copy(update={"coordinator": f"127.0.0.1:{self.link.port}"})

    def fleet(self, name: str) -> Fleet:
        fleet = Fleet(node_settings(self.site(name)).fleet)
        self.stack.callback(fleet.close)
        return fleet

    def check_ins(self, name: str) -> CheckIns:
        site = self.site(name)
        return CheckIns(name, SiteFiles(site.keys), load_site_key(SiteFiles(site.keys).site_key), site_rosters(site))

    def enrol(self, name: str) -> Invitation:
        """A further site, as far as its invitation."""
        (outcome,) = self.registrar.approve([make_keys(self.root / name / "keys", name)])
        return Invitation.read(outcome.invitation)

    def join(self, name: str) -> None:
        invitation, site = self.enrol(name), self.site(name)
        membership = invitation.check(make_request(SiteFiles(site.keys), name))
        join(invitation, membership, site, fingerprint=self.fingerprint)
        site_rosters(site).confirm(membership)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path, stack)


def trouble_of(fleet: Fleet) -> LinkTrouble:
    with pytest.raises(LinkTrouble) as caught:
        fleet.check()
    return caught.value


def test_a_new_site_is_let_in_without_a_restart_and_waits_for_confirmation_elsewhere(world: World) -> None:
    world.join("east")
    until(lambda: "east" in world.link.sites)
    world.fleet("east").check()

    north, fleet = site_rosters(world.site("north")), world.fleet("north")
    world.check_ins("north")(fleet)
    newest, force = north.newest(), north.in_force()
    assert newest is not None
    assert force is not None
    assert (newest.epoch, force.epoch) == (3, 2)
    assert [site.name for site in north.unconfirmed()] == ["east"]

    everyone = ("north", "south", "west", "east")
    for name in ("south", "west", "east"):
        world.check_ins(name)(world.fleet(name))
    chosen = world.door.choose(everyone)
    assert (chosen.roster.epoch, chosen.sites) == (2, {"north", "south", "west"})

    for name in ("north", "south", "west"):
        rosters = site_rosters(world.site(name))
        rosters.receive(world.registrar.rosters.newest_signed())
        rosters.confirm(newest)
        world.check_ins(name)(world.fleet(name))
    chosen = world.door.choose(everyone)
    assert (chosen.roster.epoch, chosen.sites) == (3, set(everyone))


def test_a_roster_that_gains_a_site_stays_usable_in_its_older_form_until_everybody_has_confirmed(world: World) -> None:
    world.join("east")
    north = site_rosters(world.site("north"))
    before = north.in_force()
    assert before is not None
    north.receive(world.registrar.rosters.newest_signed())
    after = north.newest()
    assert after is not None
    north.confirm(after)
    assert north.with_digest(before.roster.digest) == before.roster
    assert north.with_digest(after.roster.digest) == after.roster


def test_a_revoked_site_is_cut_off_within_seconds_and_left_out_elsewhere_without_confirmation(world: World) -> None:
    south, old = world.fleet("south"), site_rosters(world.site("north")).in_force()
    south.check()
    assert old is not None
    world.registrar.revoke("south")
    until(lambda: "south" not in world.link.sites)
    assert trouble_of(south).kind is Kind.NOT_ENROLLED  # the connection that was open
    until(lambda: trouble_of(world.fleet("south")).kind is Kind.OUR_CERTIFICATE)  # a new one: at the handshake

    world.check_ins("north")(world.fleet("north"))
    north = site_rosters(world.site("north"))
    force = north.in_force()
    assert force is not None
    assert (force.epoch, set(force.by_name)) == (3, {"north", "west"})
    with pytest.raises(Exception, match="use the current one"):
        north.with_digest(old.roster.digest)
    assert north.with_digest(old.roster.digest, finishing=True) == old.roster


def test_who_was_approved_replaced_and_revoked_stands_in_the_coordinators_log_once(world: World) -> None:
    def told() -> list[tuple[str, str, int]]:
        rows = inspect(audit_file(world.settings.state)).rows
        return [(row["event"], row["site"], row["epoch"]) for row in rows if "key" in row]

    begun = [("site approved", name, 2) for name in ("north", "south", "west")]
    assert told() == begun
    world.registrar.revoke("south")
    until(lambda: told() == [*begun, ("site revoked", "south", 3)])
    world.door.__exit__()
    shutil.rmtree(world.root / "west" / "keys")
    world.enrol("west")  # while no coordinator runs
    world.registrar.revoke("north")
    later = [("site revoked", "south", 3), ("site's keys replaced", "west", 4), ("site revoked", "north", 5)]
    for _ in range(2):  # one that starts takes up what happened meanwhile, the next finds it noted
        world.audit.close()
        world.audit = CoordinatorsAudit(audit_file(world.settings.state))
        with Doorkeeper(world.settings, world.link, world.audit):
            assert told() == [*begun, *later]


def test_a_site_hears_that_the_study_it_trains_on_is_over_and_of_no_other_that_it_is(world: World) -> None:
    study = classes_study()
    store = StudyStore(world.settings.state)
    store.add(sign(load_site_key(world.settings.trust.signing_key), Document.STUDY, study.canonical()))
    fleet, site, works = world.fleet("north"), world.site("north"), [Work(study.digest), Work("ab" * 32), Work("../x")]
    files = SiteFiles(site.keys)
    key, rosters = load_site_key(files.site_key), site_rosters(site)

    def given_up() -> list[bool]:
        for work in works:
            CheckIns("north", files, key, rosters, work=lambda work=work: work)(fleet)
        return [work.given_up for work in works]

    for state in (State.WAITING, State.RUNNING):  # also while a killed coordinator comes back
        store.mark(study.digest, state)
        assert given_up() == [False, False, False]
    store.mark(study.digest, State.STOPPED)
    assert given_up() == [True, False, False]


def test_a_stranger_with_a_certificate_of_the_authority_is_nobody(world: World) -> None:
    """Somebody who holds the authority's certificate, and even a client certificate of it, has no site key."""
    authority = load_authority(world.root / "fl")
    make_keys(world.root / "stranger" / "keys", "stranger")
    files = SiteFiles(world.root / "stranger" / "keys")
    request = make_request(files, "stranger")
    files.certificate.write_bytes(issue_client_certificate(authority, "stranger", request.tls_key))
    files.authority.write_bytes((world.root / "fl" / "authority.pem").read_bytes())
    settings = world.site("north").model_copy(update={"keys": files.folder, "site": "stranger"})
    fleet = Fleet(node_settings(settings).fleet)
    world.stack.callback(fleet.close)
    assert trouble_of(fleet).kind is Kind.NOT_ENROLLED
    key = load_site_key(files.site_key)
    for name in ("stranger", "north"):  # also in the name of a site that exists
        with pytest.raises(LinkTrouble) as caught:
            fleet.check_in(checkin.CheckIn(name, 1, 1, "", time.time()).signed(key))
        assert caught.value.kind is Kind.NOT_ENROLLED


def test_a_certificate_that_expires_soon_is_renewed_over_the_open_connection(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = SiteFiles(world.site("north").keys)
    request = make_request(files, "north")
    authority = load_authority(world.root / "fl")
    files.certificate.write_bytes(issue_client_certificate(authority, "north", request.tls_key, days=20))
    fleet = world.fleet("north")
    world.check_ins("north")(fleet)
    assert days_left(load_certificate(files.certificate)) > 300
    fleet.check()

    # One for another key, or another site, is not installed.
    good = files.certificate.read_bytes()
    other = make_request(SiteFiles(world.site("south").keys), "south")
    for site, key in (("north", other.tls_key), ("south", request.tls_key)):
        forged = checkin.CheckedIn(time.time(), certificate=issue_client_certificate(authority, site, key)).to_bytes()
        monkeypatch.setattr(fleet, "check_in", lambda question, forged=forged: forged)
        world.check_ins("north")(fleet)
        assert files.certificate.read_bytes() == good


def test_a_coordinator_that_cannot_write_a_renewed_certificate_says_so_and_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = SiteFiles(world.site("north").keys)
    request, authority = make_request(files, "north"), load_authority(world.root / "fl")
    files.certificate.write_bytes(issue_client_certificate(authority, "north", request.tls_key, days=20))

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Registrar, "certify", read_only)
    fleet = world.fleet("north")
    with caplog.at_level(logging.WARNING, "medfl"):
        world.check_ins("north")(fleet)
    assert "the certificate of north expires soon and cannot be renewed here" in caplog.text
    assert "Read-only file system" in caplog.text
    fleet.check()


def test_the_coordinators_certificate_is_renewed_without_dropping_a_site(world: World) -> None:
    fleet = world.fleet("north")
    fleet.check()

    before = load_certificate(world.settings.tls.certificate).serial_number
    world.registrar.renew_server((), None)
    after = load_certificate(world.settings.tls.certificate).serial_number
    assert before != after
    until(lambda: _serial(world) == after)
    fleet.check()  # the connection from before


def _serial(world: World) -> int:
    """Serial number of the certificate that a new connection sees."""
    files = SiteFiles(world.site("south").keys)
    context = ssl.create_default_context(cafile=str(files.authority))
    context.load_cert_chain(files.certificate, files.key)
    with (
        socket.create_connection(("127.0.0.1", world.link.port), 5) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as line,
    ):
        raw = line.getpeercert(binary_form=True)
    assert raw is not None
    return x509.load_der_x509_certificate(raw).serial_number


def test_a_coordinator_from_an_old_backup_takes_its_later_roster_from_a_site(world: World) -> None:
    world.join("east")
    for name in ("north", "east"):
        world.check_ins(name)(world.fleet(name))
    lost = world.settings.trust.roster / "3.json"
    signed = lost.read_bytes()
    lost.unlink()  # the backup is from before east was approved
    until(lambda: "east" not in world.link.sites)

    north = world.check_ins("north")
    fleet = world.fleet("north")
    north(fleet)  # the coordinator learns that there is a later one
    assert not lost.exists()
    north(fleet)  # and is given it
    assert lost.read_bytes() == signed
    until(lambda: "east" in world.link.sites)


def test_a_coordinator_that_goes_back_is_not_followed(world: World, caplog: pytest.LogCaptureFixture) -> None:
    fleet, north = world.fleet("north"), world.check_ins("north")
    old = world.registrar.rosters.newest_signed()
    world.registrar.revoke("west")
    north(fleet)
    answer = checkin.CheckedIn(time.time(), roster=old).to_bytes()
    with caplog.at_level(logging.ERROR, "medfl"):
        fleet.check_in = lambda question: answer  # type: ignore[method-assign]
        north(fleet)
    assert "went back from roster epoch 3 to 2" in caplog.text
    force = site_rosters(world.site("north")).in_force()
    assert force is not None
    assert force.epoch == 3


@pytest.mark.parametrize("minutes", [-7, 7])
def test_clocks_that_differ_are_told_in_minutes_on_both_sides(
    world: World, minutes: int, caplog: pytest.LogCaptureFixture
) -> None:
    site = world.site("north")
    files = SiteFiles(site.keys)
    off = CheckIns(
        "north", files, load_site_key(files.site_key), site_rosters(site), clock=lambda: time.time() + 60 * minutes
    )
    with caplog.at_level(logging.WARNING, "medfl"):
        off(world.fleet("north"))
    words = "7 minutes ahead of" if minutes > 0 else "7 minutes behind"
    assert f"this machine's clock is {words} the coordinator's" in caplog.text
    assert f"the clock of north is {words} this one" in caplog.text


def test_a_running_node_follows_the_consortium_and_its_log_says_so(world: World) -> None:
    """Revocation, then a move to another port: the node hears of both over its connection and stays."""
    site = world.site("north").model_copy(update={"state": world.root / "node-state"})
    rosters = world.site("north").state / "roster"
    (site.state).mkdir()
    (site.state / "roster").symlink_to(rosters)
    audit = Audit(audit_file(site.state))
    world.stack.callback(audit.close)
    node = Node(node_settings(site), echo, let_in, check_in=check_ins(site, audit))
    thread = threading.Thread(target=node.run, daemon=True)
    thread.start()
    world.stack.callback(thread.join, 10)
    world.stack.callback(node.stop)
    until(lambda: len(world.link.online()) == 1)
    world.registrar.revoke("west")
    until(lambda: b'"roster confirmed"' in audit_file(site.state).read_bytes())
    assert b'"epoch": 3' in audit_file(site.state).read_bytes() or b'"epoch":3' in audit_file(site.state).read_bytes()
    assert len(world.link.online()) == 1


def test_a_coordinator_that_moves_tells_its_sites_where_to(world: World, caplog: pytest.LogCaptureFixture) -> None:
    site = world.site("north").model_copy(update={"state": world.root / "moved-state", "coordinator": None})
    site.state.mkdir()
    (site.state / "roster").symlink_to(world.site("north").state / "roster")
    audit = Audit(audit_file(site.state))
    world.stack.callback(audit.close)
    world.registrar.renew_server(["127.0.0.1"], world.link.port)  # where it is reached now
    site_rosters(site).receive(world.registrar.rosters.newest_signed())
    node = Node(
        node_settings(site),
        echo,
        let_in,
        check_in=check_ins(site, audit),
        address=lambda: coordinator_address(site),
    )
    thread = threading.Thread(target=node.run, daemon=True)
    thread.start()
    world.stack.callback(thread.join, 10)
    world.stack.callback(node.stop)
    until(lambda: len(world.link.online()) == 1)

    port = free_port()
    world.registrar.renew_server(["127.0.0.1"], port)
    until(lambda: coordinator_address(site) == f"127.0.0.1:{port}")
    assert len(world.link.online()) == 1  # nobody is cut off by the announcement
    world.door.__exit__()
    world.link.__exit__()
    text = (world.root / "fl" / "consortium.yaml").read_text()
    (world.root / "fl" / "consortium.yaml").write_text(text.replace("port: 0", f"port: {port}"))
    settings = load_consortium(world.root / "fl" / "consortium.yaml")
    with Link(link_settings(settings)) as link, Doorkeeper(settings, link, world.audit):
        until(lambda: len(link.online()) == 1)
        node.stop()
        thread.join(10)


def test_the_desk_answers_sites_only_and_survives_whatever_is_posted(world: World) -> None:
    fleet = world.fleet("north")
    for body in (b"", b"\n", b"x" * 100_000, b"{}", b"AAAA\n{}"):
        with pytest.raises(LinkTrouble) as caught:
            fleet.check_in(body)
        assert caught.value.kind is Kind.NOT_ENROLLED
    assert fleet._connection.client._client.get(f"https://127.0.0.1:{world.link.port}{checkin.PATH}").status_code == 404
    fleet.check()
    fleet.close()  # a heartbeat may be on its way when the node ends
    with pytest.raises(LinkTrouble, match="closed"):
        fleet.check_in(b"")


def test_a_damaged_list_of_revoked_certificates_changes_nothing_and_is_told(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "medfl"):
        world.settings.trust.revoked.write_text("nonsense")
        until(lambda: "not a list of revoked certificates" in caplog.text)
    world.fleet("north").check()


def test_a_site_whose_keys_have_a_passphrase_connects_with_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"correct horse\n")
    secret.chmod(0o600)
    monkeypatch.setenv("MEDFL_PASSPHRASE_FILE", str(secret))
    passphrase.cache_clear()
    make_keys(tmp_path / "east" / "keys", "east", passphrase=b"correct horse")
    world.join("east")
    assert b"ENCRYPTED" in (tmp_path / "east" / "keys" / "client.key").read_bytes()
    until(lambda: "east" in world.link.sites)
    world.fleet("east").check()
    world.check_ins("east")(world.fleet("east"))
    assert world.door.choose(["east"]).sites == {"east"}
    passphrase.cache_clear()
