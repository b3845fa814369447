"""Requests and invitations: whole, for these keys, or refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from consortium import found_consortium_folder
from hypothesis import given
from hypothesis import strategies as st

from medfl.shared.certificates import SiteFiles
from medfl.shared.enrolment import Invitation, Request, make_keys, make_request, read_request
from medfl.shared.errors import ConfigError, PolicyRefusal


def changed(path: Path, **fields: object) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path


def test_a_request_is_read_back_and_its_fingerprint_is_that_of_the_site_key(tmp_path: Path) -> None:
    made = make_keys(tmp_path, "north")
    read = read_request(tmp_path / "request.json")
    assert (read.site, read.node_key, read.site_key) == (made.site, made.node_key, made.site_key)
    assert read.tls_key == made.tls_key
    assert read.fingerprint == made.fingerprint


@pytest.mark.parametrize("key", ["node.key", "site.key"])
def test_a_public_half_that_was_lost_is_written_again(tmp_path: Path, key: str) -> None:
    make_keys(tmp_path, "north")
    public = tmp_path / f"{key}.pub"
    before, private = public.read_bytes(), (tmp_path / key).read_bytes()
    public.unlink()
    make_keys(tmp_path, "north")
    assert (public.read_bytes(), (tmp_path / key).read_bytes()) == (before, private)


@pytest.mark.parametrize("field", ["site", "node_key", "site_key", "signing_request", "signature"])
def test_no_field_of_a_request_can_be_swapped_for_another_sites(tmp_path: Path, field: str) -> None:
    """Not even by somebody who has keys of his own: the site key, whose fingerprint is compared, signs all of it."""
    make_keys(tmp_path / "north", "north")
    other = make_keys(tmp_path / "south", "south")
    theirs = json.loads(other.to_bytes())[field]
    with pytest.raises(ConfigError, match="was altered on its way"):
        read_request(changed(tmp_path / "north" / "request.json", **{field: theirs}))


def test_a_request_is_not_signed_in_the_name_of_a_key_that_one_does_not_hold(tmp_path: Path) -> None:
    request = make_keys(tmp_path, "north")
    forged = Request(
        request.site, request.signing_request, request.tls_key, request.node_key, request.site_key, bytes(64)
    )
    with pytest.raises(ConfigError, match="was altered"):
        Request.parse(forged.to_bytes())


@given(st.binary(max_size=200) | st.dictionaries(st.text(), st.text()).map(lambda x: json.dumps(x).encode()))
def test_what_is_no_request_is_told_as_such(raw: bytes) -> None:
    with pytest.raises(ConfigError, match="is not a site's request"):
        Request.parse(raw)


@pytest.fixture
def invited(tmp_path: Path) -> Path:
    found_consortium_folder(tmp_path)
    return tmp_path


def invitation_file(root: Path, site: str = "north") -> Path:
    return root / "fl" / "invitations" / f"{site}.json"


def own(root: Path, site: str = "north") -> Request:
    return make_request(SiteFiles(root / site / "keys"), site)


def test_an_invitation_holds_no_private_key_and_fits_the_site_that_asked(invited: Path) -> None:
    assert "PRIVATE" not in invitation_file(invited).read_text()
    membership = Invitation.read(invitation_file(invited)).check(own(invited))
    assert (membership.epoch, set(membership.by_name)) == (2, {"north", "south", "west"})


@pytest.mark.parametrize("field", ["authority", "certificate", "signing_key", "roster"])
def test_a_part_of_another_consortiums_invitation_does_not_fit(tmp_path: Path, field: str) -> None:
    """And whoever exchanges all parts exchanges the fingerprint, which the site hears by telephone."""
    for folder in ("one", "two"):
        found_consortium_folder(tmp_path / folder)
    two = json.loads(invitation_file(tmp_path / "two").read_text())
    forged = Invitation.read(changed(invitation_file(tmp_path / "one"), **{field: two[field]}))
    with pytest.raises(PolicyRefusal):
        forged.check(own(tmp_path / "one"))
    fingerprints = {
        Invitation.read(invitation_file(tmp_path / folder, "south")).fingerprint for folder in ("one", "two")
    }
    assert len(fingerprints) == 2
    if field in ("authority", "signing_key"):
        assert forged.fingerprint not in fingerprints


def test_another_sites_invitation_is_refused(invited: Path) -> None:
    with pytest.raises(PolicyRefusal, match="is for site south, and this is site north"):
        Invitation.read(invitation_file(invited, "south")).check(own(invited))


def test_an_invitation_for_keys_that_were_made_anew_is_refused(invited: Path) -> None:
    keys = invited / "north" / "keys"
    keys.rename(invited / "north" / "old-keys")
    make_keys(keys, "north")
    with pytest.raises(PolicyRefusal, match="does not have this site under its keys"):
        Invitation.read(invitation_file(invited)).check(own(invited))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"medfl_invitation": 2}', b"\xff"])
def test_what_is_no_invitation_is_told_as_such(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ConfigError, match="is not an invitation"):
        Invitation.read(tmp_path / "x.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Invitation.read(tmp_path / "absent.json")


def test_a_signature_is_not_taken_for_base64_of_something_else(tmp_path: Path) -> None:
    make_keys(tmp_path, "north")
    path = changed(tmp_path / "request.json", signature=base64.b64encode(b"short").decode())
    with pytest.raises(ConfigError):
        read_request(path)
