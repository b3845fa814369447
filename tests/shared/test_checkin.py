"""Check-ins: only a site speaks for itself, and bytes from elsewhere never break the parser."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from medfl.shared.checkin import CheckedIn, CheckIn, verify
from medfl.shared.errors import ProtocolError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
CLAIM = CheckIn("north", 2, 3, "SHA256:x", 1.5, working_on="ab" * 32)


def test_a_check_in_is_read_back_and_believed_with_the_sites_own_key() -> None:
    claim, signature, content = CheckIn.parse(CLAIM.signed(KEY))
    assert claim == CLAIM
    verify(KEY.public_key(), signature, content)
    with pytest.raises(ProtocolError, match="not signed with the site's key"):
        verify(Ed25519PrivateKey.generate().public_key(), signature, content)


def test_a_changed_check_in_is_not_believed() -> None:
    _, signature, content = CheckIn.parse(CLAIM.signed(KEY).replace(b'"in_force": 2', b'"in_force": 9'))
    with pytest.raises(ProtocolError):
        verify(KEY.public_key(), signature, content)


ANYTHING = st.binary(max_size=100) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
).map(lambda value: json.dumps(value).encode())


@given(ANYTHING)
def test_whatever_comes_is_parsed_or_a_protocol_error(raw: bytes) -> None:
    for content in (raw, b"AAAA\n" + raw):
        with pytest.raises(ProtocolError):
            CheckIn.parse(content)
    with pytest.raises(ProtocolError):
        CheckedIn.parse(raw)


@given(
    st.sampled_from(["version", "site", "in_force", "newest", "fingerprint", "time", "renew", "roster", "working_on"]),
    st.none() | st.booleans() | st.text(max_size=5) | st.lists(st.integers(), max_size=2),
)
def test_a_field_of_another_kind_never_breaks_the_parser(field: str, value: object) -> None:
    signature, content = CLAIM.signed(KEY).split(b"\n", 1)
    raw = signature + b"\n" + json.dumps(json.loads(content) | {field: value}).encode()
    try:
        claim, *_ = CheckIn.parse(raw)
    except ProtocolError:
        return
    assert getattr(claim, field, None) == value or field == "version"


def test_an_answer_is_read_back() -> None:
    answer = CheckedIn(12.5, certificate=b"pem", send_roster=True, over=True)
    assert CheckedIn.parse(answer.to_bytes()) == answer


def test_those_who_do_not_speak_of_work_yet_are_understood() -> None:
    def without(raw: bytes, field: str) -> bytes:
        return json.dumps({key: value for key, value in json.loads(raw).items() if key != field}).encode()

    signature, content = CLAIM.signed(KEY).split(b"\n", 1)
    claim, *_ = CheckIn.parse(signature + b"\n" + without(content, "working_on"))
    assert claim.working_on == ""
    assert not CheckedIn.parse(without(CheckedIn(1.0, over=True).to_bytes(), "over")).over
