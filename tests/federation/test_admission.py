"""Who is let in, and how each refusal reads for the person whose machine is refused."""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
import time
from contextlib import suppress
from pathlib import Path

import pytest
from certified import Consortium, create_consortium, create_site_files, load_authority
from federation import Lab, fleet_settings, question, text_of, until

from medfl.client.fleet import Fleet
from medfl.client.node import NodeSettings, Phase, check
from medfl.client.transport import Kind, LinkTrouble, TransportSettings, tls_context
from medfl.server.fleet_tls import TlsFiles
from medfl.server.guard import Limits
from medfl.server.link import Link, LinkSettings
from medfl.shared.certificates import (
    issue_server_certificate,
)
from medfl.shared.errors import ConfigError, NetworkError


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """Another consortium, with a site of the same name."""
    return create_consortium(tmp_path_factory.mktemp("elsewhere"), sites=["north"], hosts=["127.0.0.1"])


def trouble_of(settings: NodeSettings) -> LinkTrouble:
    with pytest.raises(LinkTrouble) as caught:
        check(settings)
    assert "\n" not in str(caught.value)
    return caught.value


def raw(lab: Lab, link: Link, certificate: tuple[Path, Path] | None) -> ssl.SSLContext:
    """TLS as a stranger would set it up, without our own checks."""
    context = ssl.create_default_context(cafile=lab.consortium.authority)
    if certificate:
        context.load_cert_chain(*certificate)
    return context


def request(link: Link, context: ssl.SSLContext, method: str, path: str, body: object = None) -> int:
    connection = http.client.HTTPSConnection("127.0.0.1", link.port, context=context, timeout=60)
    try:
        connection.request(method, path, body)  # type: ignore[arg-type]
        return connection.getresponse().status
    finally:
        connection.close()


def member(lab: Lab) -> ssl.SSLContext:
    files = lab.consortium.sites["north"]
    return tls_context(TransportSettings("", files.authority, files.certificate, files.key))


def test_a_member_is_accepted_without_joining(lab: Lab) -> None:
    link = lab.link()
    check(lab.node_settings("north", link.port))
    assert link.online() == set()


def test_a_stranger_with_certificates_but_an_unknown_node_key_is_not_enrolled(lab: Lab) -> None:
    link = lab.link(sites=2)  # west holds a good certificate and a key that is not in the roster
    trouble = trouble_of(lab.node_settings("west", link.port))
    assert trouble.kind is Kind.NOT_ENROLLED
    assert "SHA256:" in str(trouble)
    running = lab.node("west", link.port)
    until(lambda: bool(running.news))
    assert running.news[0][0] is Phase.WAITING
    assert "roster" in running.news[0][1]
    assert link.online() == set()


def test_a_site_cannot_speak_as_another(lab: Lab) -> None:
    link = lab.link()
    ids = link.enrol(lab.roster())
    north = Fleet(fleet_settings(lab.consortium.sites["north"], link.port))
    own_id = north.join(None)
    assert own_id == ids["north"]
    for attempt in (north.next_order, north.beat, north.leave):
        with pytest.raises(LinkTrouble) as caught:
            attempt(ids["south"])
        assert caught.value.kind is Kind.NOT_ENROLLED
    north.close()


@pytest.mark.parametrize("which", ["none", "other authority", "expired", "server's"])
def test_without_a_good_client_certificate_there_is_no_connection(
    lab: Lab, elsewhere: Consortium, which: str, tmp_path: Path
) -> None:
    link = lab.link()
    authority = load_authority(lab.consortium.authority.parent)
    expired = create_site_files(authority, tmp_path / "expired", "north", days=-1)
    foreign = elsewhere.sites["north"]
    certificate = {
        "none": None,
        "other authority": (foreign.certificate, foreign.key),
        "expired": (expired.certificate, expired.key),
        "server's": (lab.consortium.certificate, lab.consortium.key),  # not meant for clients
    }[which]
    with pytest.raises((OSError, http.client.HTTPException)):
        request(link, raw(lab, link, certificate), "GET", "/health")
    assert request(link, member(lab), "GET", "/health") == 200


def test_our_certificate_refused_is_told_as_that(lab: Lab, tmp_path: Path) -> None:
    link = lab.link()
    authority = load_authority(lab.consortium.authority.parent)
    files = create_site_files(authority, tmp_path / "site", "north")
    files.certificate.write_bytes(lab.consortium.certificate.read_bytes())  # ours, and valid, but not for clients
    files.key.write_bytes(lab.consortium.key.read_bytes())
    trouble = trouble_of(NodeSettings(fleet_settings(files, link.port), tmp_path))
    assert trouble.kind is Kind.OUR_CERTIFICATE


def test_what_is_wrong_with_our_own_files_is_said_before_dialling(
    lab: Lab, elsewhere: Consortium, tmp_path: Path
) -> None:
    authority = load_authority(lab.consortium.authority.parent)
    expired = create_site_files(authority, tmp_path / "expired", "north", days=-1)
    mixed = create_site_files(authority, tmp_path / "mixed", "north")
    mixed.authority.write_bytes(elsewhere.authority.read_bytes())
    swapped = create_site_files(authority, tmp_path / "swapped", "north")
    swapped.key.write_bytes(mixed.key.read_bytes())
    for files, words in [(expired, "expired on"), (mixed, "not signed by"), (swapped, "does not belong")]:
        with pytest.raises(ConfigError, match=words):
            check(NodeSettings(fleet_settings(files, 1), tmp_path))


def test_a_coordinator_of_another_authority_is_not_trusted(lab: Lab, elsewhere: Consortium) -> None:
    link = lab.link()
    settings = NodeSettings(fleet_settings(elsewhere.sites["north"], link.port), lab.folder / "x")
    trouble = trouble_of(settings)
    assert trouble.kind is Kind.UNKNOWN_AUTHORITY


@pytest.mark.parametrize(
    ("hosts", "days", "kind"), [("localhost", 1, Kind.WRONG_NAME), ("127.0.0.1", -1, Kind.EXPIRED)]
)
def test_a_coordinators_certificate_for_another_name_or_out_of_date_is_told_apart(
    lab: Lab, tmp_path: Path, hosts: str, days: float, kind: Kind
) -> None:
    issue_server_certificate(load_authority(lab.consortium.authority.parent), tmp_path, [hosts], days=days)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "coordinator.pem", tmp_path / "coordinator.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = lab.node_settings("north", listener.getsockname()[1])

        async def serve() -> LinkTrouble:
            server = await asyncio.start_server(lambda r, w: w.close(), sock=listener, ssl=context)
            async with server:
                return await asyncio.to_thread(trouble_of, settings)

        assert asyncio.run(serve()).kind is kind


def test_an_expired_certificate_keeps_the_coordinator_from_starting(lab: Lab, tmp_path: Path) -> None:
    issue_server_certificate(load_authority(lab.consortium.authority.parent), tmp_path, ["127.0.0.1"], days=-1)
    c = lab.consortium
    certificate, key = tmp_path / "coordinator.pem", tmp_path / "coordinator.key"
    settings = LinkSettings("127.0.0.1", 0, TlsFiles(c.authority, certificate, key), tmp_path)
    with pytest.raises(ConfigError, match="expired on"), Link(settings):
        pass


def test_nobody_there_is_unreachable_and_a_port_in_use_is_told(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(NetworkError, match="cannot listen"), Link(lab.link_settings(port=port)):
            pass
    assert trouble_of(lab.node_settings("north", port)).kind is Kind.UNREACHABLE


def test_tls_before_1_3_is_refused(lab: Lab) -> None:
    link = lab.link()
    context = member(lab)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        request(link, context, "GET", "/health")


def test_only_the_fleet_interface_and_health_exist(lab: Lab) -> None:
    link, context = lab.link(), member(lab)
    for method, path in [
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/control/register-node"),
        ("POST", "/v1/runtime/acquire-task"),
        ("GET", "/"),
        ("GET", "/v1/fleet/../control/list-nodes"),
        ("GET", "//health"),
    ]:
        assert request(link, context, method, path) == 404, path
    assert request(link, context, "GET", "/health") == 200
    # Registration through the fleet interface stays closed, whoever asks.
    headers = {"content-type": "application/protobuf"}
    connection = http.client.HTTPSConnection("127.0.0.1", link.port, context=context, timeout=60)
    for name in ("register-node", "unregister-node", "pull-messages", "push-messages", "push-object", "pull-object"):
        path = f"/v1/fleet/{name}"
        connection.request("POST", path, b"", headers)
        response = connection.getresponse()
        response.read()
        assert response.status == 401, path
    connection.close()


def test_a_body_over_the_cap_is_refused_announced_or_not(lab: Lab) -> None:
    link, context = lab.link(limits=Limits(max_body_bytes=100_000)), member(lab)
    path = "/v1/fleet/push-object"
    assert request(link, context, "POST", path, b"0" * 100_001) == 413
    assert request(link, context, "POST", path, (b"0" * 10_000 for _ in range(11))) == 413  # chunked
    assert request(link, context, "POST", path, b"0" * 100_000) == 415  # reached Flower, which wants protobuf


def test_a_slow_body_is_given_up(lab: Lab) -> None:
    link = lab.link(limits=Limits(max_pause_s=0.3))

    def drip():  # type: ignore[no-untyped-def]
        yield b"0"
        time.sleep(1)
        yield b"0"

    with suppress(OSError):  # the connection may be closed while we are still sending
        assert request(link, member(lab), "POST", "/v1/fleet/push-object", drip()) == 408
    assert request(link, member(lab), "GET", "/health") == 200


def test_a_site_removed_from_the_roster_is_cut_off_and_comes_back_by_itself_when_readmitted(lab: Lab) -> None:
    link = lab.link(sites=2)
    ids = link.enrol(lab.roster(2))
    running = lab.node("south", link.port)
    until(lambda: link.online() == {ids["south"]})
    assert link.enrol(lab.roster(1)) == {"north": ids["north"]}
    assert link.online() == set()
    until(lambda: running.phase is Phase.WAITING)
    assert "roster" in running.news[-1][1] or "node key" in running.news[-1][1]
    assert link.enrol(lab.roster(2)) == ids
    until(lambda: link.online() == {ids["south"]})
    with link.run(None, name="study", digest="d" * 64) as run:
        (reply,) = run.grid.send_and_receive([question(ids["south"])], timeout=60)
        assert text_of(reply) == "hello"


def test_two_sites_with_one_key_are_refused(lab: Lab) -> None:
    link = lab.link()
    key = lab.roster(1)["north"]
    with pytest.raises(ConfigError, match="the same node key"):
        link.enrol({"north": key, "south": key})
    with pytest.raises(ConfigError, match="malformed"):
        link.enrol({"north": "ssh-rsa nonsense"})
