"""``medfl-server init``: authority, certificate, signing key, an empty roster, and a configuration that starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from medfl.shared.addresses import address, dialled
from medfl.shared.certificates import create_authority, issue_server_certificate, revocation_list
from medfl.shared.consortium import Membership, consortium_fingerprint
from medfl.shared.errors import ConfigError
from medfl.shared.files import private_folder, write_whole
from medfl.shared.keys import PUBLIC_FILE, write_new
from medfl.shared.signing import create_signing_key, load_signing_key
from medfl.shared.study import Name

_CONFIG = """\
# medfl-server --config consortium.yaml; relative paths count from this file's folder.
consortium: {name}
listen: {{host: {listen}, port: {port}}}
tls: {{authority: authority.pem, certificate: coordinator.pem, key: coordinator.key}}
trust:
  signing_key: signing.key      # signs rosters and studies
  authority_key: authority.key  # signs certificates; may lie on a medium that is only there for approve and revoke
  roster: roster                # one signed file an epoch
  certificates: certificates
  revoked: revoked.pem
state: state
runs: runs
studies: []  # for example [study.yaml]
when_done: stay  # keep serving sites after the last study; or exit
"""


def found(
    folder: Path,
    *,
    hosts: Sequence[str],
    port: int,
    listen: str = "0.0.0.0",  # noqa: S104 - hospitals dial in from outside; TLS and client certificates guard it
    name: str | None = None,
    minimum_cohort: int | None = None,
    passphrase: bytes | None = None,
) -> str:
    """Make a consortium in ``folder``; returns its fingerprint.

    The first of ``hosts`` is what sites dial; the certificate is for all of them.

    Raises:
        ConfigError: ``folder`` holds a consortium already, cannot name one, or a host is malformed.
    """
    name = folder.resolve().name.lower() if name is None else name
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ConfigError(f"'{name[:80]}' cannot name a consortium: use lower-case letters, digits and . _ -") from None
    try:
        first = Membership(
            consortium=name,
            epoch=1,
            floor=1,
            coordinator=dialled(address(hosts[0], port)),
            minimum_cohort=minimum_cohort,
            next_id=1,
        )
    except ValueError:
        raise ConfigError(
            f"host '{hosts[0][:80]}' port {port} is not an address that sites can dial: ports go from 1 to 65535"
        ) from None
    if (folder / "consortium.yaml").exists():
        raise ConfigError(f"{folder}: holds a consortium already: choose another folder")
    private_folder(folder)
    authority = create_authority(folder, name=f"MedFL consortium {name}", passphrase=passphrase)
    issue_server_certificate(authority, folder, hosts, passphrase=passphrase)
    public = create_signing_key(folder, consortium=name, passphrase=passphrase)
    write_whole(folder / "revoked.pem", revocation_list(authority, ()), mode=PUBLIC_FILE)
    write_new(folder / "roster" / "1.json", first.signed(load_signing_key(folder)).to_bytes(), mode=PUBLIC_FILE)
    private_folder(folder / "certificates")
    # Last: a folder with a configuration is a whole one.
    quoted = f'"{listen}"' if ":" in listen else listen  # YAML does not take ::1 for text
    config = _CONFIG.format(name=name, listen=quoted, port=port)
    write_whole(folder / "consortium.yaml", config.encode(), mode=PUBLIC_FILE)
    return consortium_fingerprint(authority.certificate, public)
