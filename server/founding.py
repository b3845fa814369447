"""``medfl-server init``: from the sites' requests to a folder whose configuration only lacks a study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from medfl.shared.enrolment import found_consortium, read_request
from medfl.shared.files import write_whole

_CONFIG = """\
consortium: {name}
listen: {{host: 0.0.0.0, port: {port}}}
tls: {{authority: authority.pem, certificate: coordinator.pem, key: coordinator.key}}
state: state
runs: runs
studies: []  # for example [study.yaml]
sites:
{sites}"""

_SITE = "  - {{name: {name}, node_key: sites/{name}/node.key.pub, site_key: sites/{name}/site.key.pub}}\n"


def found(folder: Path, requests: Sequence[Path], *, hosts: Sequence[str], port: int) -> Iterator[str]:
    """Make everything and yield, line by line, what was made and what to do next.

    Raises:
        ConfigError: a request is malformed, or ``folder`` holds a consortium already.
    """
    read = [read_request(path) for path in requests]
    found_consortium(folder, read, hosts=hosts)
    sites = "".join(_SITE.format(name=request.site) for request in read)
    config = _CONFIG.format(name=folder.resolve().name.lower(), port=port, sites=sites)
    write_whole(folder / "consortium.yaml", config.encode(), mode=0o644)
    yield f"{folder}/consortium.yaml and the authority are made. Keep authority.key offline."
    for request in read:
        yield f"site {request.site}: compare by telephone, then send it the two .pem files of sites/{request.site}:"
        for what, value in request.fingerprints.items():
            yield f"  {what}  {value}"
    yield f"next: name a study in {folder}/consortium.yaml, then medfl-server --config {folder}/consortium.yaml --check"
