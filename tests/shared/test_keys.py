"""Keys: formats, fingerprints, and files that are private and never overwritten."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from medfl.shared.errors import ConfigError
from medfl.shared.keys import (
    create_node_key,
    create_site_key,
    fingerprint,
    load_node_key,
    load_site_key,
    node_public_key,
    public_line,
    read_private,
    read_public_key,
    write_new,
)


def test_a_node_key_is_read_back_and_its_public_half_is_what_flower_compares(tmp_path: Path) -> None:
    public = create_node_key(tmp_path / "node.key", comment="north")
    assert load_node_key(tmp_path / "node.key").public_key() == public
    line = (tmp_path / "node.key.pub").read_text()
    assert line.startswith("ecdsa-sha2-nistp384 ")
    assert line.endswith(" north\n")
    pem = node_public_key(line)
    assert pem.startswith(b"-----BEGIN PUBLIC KEY-----")
    assert node_public_key(pem) == pem


def test_a_site_key_signs_and_its_public_half_verifies(tmp_path: Path) -> None:
    public = create_site_key(tmp_path / "site.key")
    signature = load_site_key(tmp_path / "site.key").sign(b"round 1")
    assert read_public_key(public_line(public)) == public
    public.verify(signature, b"round 1")  # type: ignore[call-arg,union-attr]


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_the_fingerprint_is_the_one_that_ssh_keygen_prints(tmp_path: Path) -> None:
    public = create_node_key(tmp_path / "node.key")
    printed = subprocess.run(
        ["ssh-keygen", "-lf", tmp_path / "node.key.pub"], capture_output=True, text=True, check=True
    )
    assert fingerprint(public) in printed.stdout.split()


def test_files_are_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "node.key"
    create_node_key(path)
    before = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    for again in (create_node_key, create_site_key, lambda p: write_new(p, b"other")):
        with pytest.raises(ConfigError, match="not overwritten"):
            again(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["node.key", "node.key.pub"]


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    create_node_key(tmp_path / "node.key")
    (tmp_path / "node.key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_node_key(tmp_path / "node.key")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_private(tmp_path / "absent.key")


def test_the_wrong_kind_of_key_is_named(tmp_path: Path) -> None:
    create_node_key(tmp_path / "node.key")
    site = create_site_key(tmp_path / "site.key")
    write_new(tmp_path / "not.key", b"not a key")
    with pytest.raises(ConfigError, match="not a node key"):
        load_node_key(tmp_path / "site.key")
    with pytest.raises(ConfigError, match="not a site key"):
        load_site_key(tmp_path / "node.key")
    with pytest.raises(ConfigError, match="OpenSSH"):
        load_node_key(tmp_path / "not.key")
    with pytest.raises(ConfigError, match="P-384"):
        node_public_key(public_line(site))
    p256 = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(ConfigError, match="P-384"):
        node_public_key(p256.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))


@pytest.mark.parametrize("text", ["", "ssh-rsa", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "\x00"])
def test_malformed_public_keys_are_configuration_errors(text: str) -> None:
    with pytest.raises(ConfigError):
        read_public_key(text)
