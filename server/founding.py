"""``medfl-server init``: from the sites' requests to a folder whose configuration only lacks a study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import TypeAdapter, ValidationError

from medfl.shared.enrolment import Request, found_consortium, read_request
from medfl.shared.errors import ConfigError
from medfl.shared.files import write_whole
from medfl.shared.keys import read_public_key
from medfl.shared.secagg.roster import Member, Roster, make_roster, roster_text
from medfl.shared.study import Name

_CONFIG = """\
consortium: {name}
listen: {{host: 0.0.0.0, port: {port}}}
tls: {{authority: authority.pem, certificate: coordinator.pem, key: coordinator.key}}
state: state
runs: runs
roster: roster.yaml
studies: []  # for example [study.yaml]
sites:
{sites}"""

_SITE = "  - {{name: {name}, node_key: sites/{name}/node.key.pub}}\n"


def first_roster(consortium: str, requests: Sequence[Request]) -> Roster:
    """Epoch 1: every requesting site under the next free id, with its site key. Raises ConfigError on doubles."""
    members = []
    for number, request in enumerate(requests, 1):
        key = read_public_key(request.site_key)
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(f"site {request.site} sent no Ed25519 site key: make the request with medfl-client keys")
        members.append(Member(number, request.site, key.public_bytes_raw()))
    return make_roster(consortium, 1, members)


def found(folder: Path, requests: Sequence[Path], *, hosts: Sequence[str], port: int) -> Iterator[str]:
    """Make everything and yield, line by line, what was made and what to do next.

    Raises:
        ConfigError: a request is malformed, or ``folder`` holds a consortium already or cannot name one.
    """
    name = folder.resolve().name.lower()
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"{folder}: the folder's name becomes the consortium's: use letters, digits and any of . _ - only"
        ) from None
    read = [read_request(path) for path in requests]
    found_consortium(folder, read, hosts=hosts)
    sites = "".join(_SITE.format(name=request.site) for request in read)
    config = _CONFIG.format(name=name, port=port, sites=sites)
    write_whole(folder / "consortium.yaml", config.encode(), mode=0o644)
    write_whole(folder / "roster.yaml", roster_text(first_roster(name, read)).encode(), mode=0o644)
    yield f"{folder}/consortium.yaml and the authority are made. Keep authority.key offline."
    for request in read:
        yield f"site {request.site}: compare by telephone, then send it roster.yaml and the .pem files of"
        yield f"{folder}/sites/{request.site}:"
        for what, value in request.fingerprints.items():
            yield f"  {what}  {value}"
    yield f"next: name a study in {folder}/consortium.yaml, then medfl-server --config {folder}/consortium.yaml --check"
