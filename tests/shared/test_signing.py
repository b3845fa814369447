"""Signed documents: what a signature covers, and whom a site believes."""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfl.shared import passphrase as passphrases
from medfl.shared.errors import Code, ConfigError, ProtocolError
from medfl.shared.keys import create_node_key
from medfl.shared.signing import (
    Document,
    SignatureRefused,
    Signed,
    create_signing_key,
    load_signing_key,
    load_signing_public_key,
    sign,
)

SECRET = b"correct horse"


@pytest.fixture(autouse=True)
def fresh_passphrase() -> Iterator[None]:
    passphrases.passphrase.cache_clear()
    yield
    passphrases.passphrase.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_signing_key(tmp_path, consortium="example")
    return tmp_path


def test_a_signed_document_is_read_back_with_the_key_that_was_pinned(folder: Path) -> None:
    signed = Signed.parse(sign(load_signing_key(folder), Document.STUDY, b"a study").to_bytes())
    assert signed.content(load_signing_public_key(folder / "signing.key.pub"), Document.STUDY) == b"a study"


def test_only_its_owner_can_read_the_signing_key(folder: Path) -> None:
    assert stat.S_IMODE((folder / "signing.key").stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        create_signing_key(folder, consortium="example")


def test_another_consortiums_signature_is_refused(folder: Path, tmp_path: Path) -> None:
    other = create_signing_key(tmp_path / "other", consortium="other")
    with pytest.raises(SignatureRefused, match="not signed with the consortium's key") as caught:
        sign(load_signing_key(folder), Document.ROSTER, b"x").content(other, Document.ROSTER)
    assert (caught.value.code, caught.value.exit_status) == (Code.REFUSED, 3)


def test_a_study_cannot_pass_for_a_roster(folder: Path) -> None:
    """Neither under its own name nor under the other: the kind is under the signature."""
    public = load_signing_public_key(folder / "signing.key.pub")
    study = sign(load_signing_key(folder), Document.STUDY, b"x")
    for claimed in (study, Signed(Document.ROSTER, study.unverified, study.signature)):
        with pytest.raises(SignatureRefused):
            claimed.content(public, Document.ROSTER)


@given(st.binary(min_size=1, max_size=50), st.integers(0), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(content: bytes, place: int, change: int) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    signed = sign(key, Document.ROSTER, content)
    changed = bytearray(content)
    changed[place % len(content)] ^= change
    with pytest.raises(SignatureRefused):
        Signed(Document.ROSTER, bytes(changed), signed.signature).content(key.public_key(), Document.ROSTER)


@given(
    st.binary(max_size=300)
    | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_what_is_not_a_signed_document_is_a_protocol_error(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="signed document"):
        Signed.parse(raw)


def test_a_key_with_a_passphrase_opens_with_it_and_only_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = create_signing_key(tmp_path, consortium="example", passphrase=SECRET)
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET + b"\n")
    secret.chmod(0o600)
    monkeypatch.setenv("MEDFL_PASSPHRASE_FILE", str(secret))
    assert load_signing_key(tmp_path).public_key() == public
    assert SECRET not in (tmp_path / "signing.key").read_bytes()

    passphrases.passphrase.cache_clear()
    secret.write_bytes(b"wrong")
    with pytest.raises(ConfigError, match="does not open with this passphrase"):
        load_signing_key(tmp_path)


def test_systemds_credential_comes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "medfl-passphrase").write_bytes(b"from systemd\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("MEDFL_PASSPHRASE_FILE", os.devnull)
    assert passphrases.passphrase() == b"from systemd"


@pytest.mark.parametrize(("content", "mode", "words"), [(b"x", 0o644, "chmod 600"), (b"\n", 0o600, "is empty")])
def test_a_passphrase_file_that_others_can_read_or_that_is_empty_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, mode: int, words: str
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    monkeypatch.setenv("MEDFL_PASSPHRASE_FILE", str(path))
    with pytest.raises(ConfigError, match=words):
        passphrases.passphrase()


def test_without_a_file_and_without_a_terminal_it_is_said_where_the_passphrase_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDFL_PASSPHRASE_FILE", raising=False)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    create_node_key(tmp_path / "node.key", passphrase=SECRET)
    from medfl.shared.keys import load_node_key

    with pytest.raises(ConfigError, match=r"LoadCredential=medfl-passphrase"):
        load_node_key(tmp_path / "node.key")


def test_a_running_services_other_threads_ask_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDFL_PASSPHRASE_FILE", raising=False)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda prompt: "typed")
    with ThreadPoolExecutor(1) as pool, pytest.raises(ConfigError, match="nobody is here to type it"):
        pool.submit(passphrases.passphrase).result()
    assert passphrases.passphrase() == b"typed"
