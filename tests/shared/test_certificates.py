"""The consortium's certificates: who signs what, for how long, and what is said when it does not fit."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from certified import create_consortium, load_authority
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from medfl.shared.certificates import (
    check_certificate,
    check_site_name,
    common_name,
    create_authority,
    days_left,
    issue_server_certificate,
    load_certificate,
)
from medfl.shared.errors import ConfigError
from medfl.shared.keys import load_node_key, load_site_key


def test_a_consortium_has_everything_each_side_needs(tmp_path: Path) -> None:
    made = create_consortium(tmp_path, sites=["north", "south"], hosts=["fl.example.org", "10.0.0.1"])
    server = load_certificate(made.certificate)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]
    for site, files in made.sites.items():
        certificate = load_certificate(files.certificate)
        assert common_name(certificate) == site
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
        assert check_certificate(files.certificate, authority=files.authority) == pytest.approx(397, abs=0.01)
        load_node_key(files.node_key)
        load_site_key(files.site_key)
    private = [path for path in tmp_path.rglob("*.key") if path.stat().st_mode & 0o777 != 0o600]
    assert private == []


def test_days_left_counts_down_to_expiry_and_below(tmp_path: Path) -> None:
    authority = create_authority(tmp_path, days=10)
    end = authority.certificate.not_valid_after_utc
    assert days_left(authority.certificate, now=end - datetime.timedelta(days=2)) == 2.0
    assert days_left(authority.certificate, now=end + datetime.timedelta(days=1)) == -1.0


def test_what_does_not_fit_is_told_apart(tmp_path: Path) -> None:
    made = create_consortium(tmp_path / "a", sites=["north"], hosts=["localhost"])
    other = create_consortium(tmp_path / "b", sites=["north"], hosts=["localhost"])
    files = made.sites["north"]
    with pytest.raises(ConfigError, match="not signed by"):
        check_certificate(files.certificate, authority=other.authority)
    now = datetime.datetime.now(datetime.UTC)
    with pytest.raises(ConfigError, match="expired on"):
        check_certificate(files.certificate, authority=files.authority, now=now + datetime.timedelta(days=400))
    with pytest.raises(ConfigError, match="clock"):
        check_certificate(files.certificate, authority=files.authority, now=now - datetime.timedelta(days=1))
    with pytest.raises(ConfigError, match="PEM"):
        check_certificate(files.key, authority=files.authority)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_certificate(tmp_path / "absent.pem")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    create_consortium(tmp_path, sites=["north"], hosts=["localhost"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(ConfigError, match="not overwritten"):
        create_consortium(tmp_path, sites=["north"], hosts=["localhost"])
    with pytest.raises(ConfigError, match="not overwritten"):
        issue_server_certificate(load_authority(tmp_path), tmp_path, ["localhost"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize("name", ["", "North", "north_1", "-north", "north-", "a" * 64, "../north", "north\n"])
def test_a_malformed_site_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="site name"):
        check_site_name(name)


def test_hosts_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    authority = create_authority(tmp_path / "authority")
    for hosts, words in (([], "at least one host"), (["münchen"], "neither an address")):
        with pytest.raises(ConfigError, match=words):
            issue_server_certificate(authority, tmp_path / "c", hosts)
    assert not (tmp_path / "c").exists()
