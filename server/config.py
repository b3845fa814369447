"""What ``medfl-server --config`` reads: where to listen, who belongs to the consortium, which studies to run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from medfl.shared.config import Host, LocalPath, LocalPort, Settings, load_settings
from medfl.shared.errors import ConfigError
from medfl.shared.owner import check_owner
from medfl.shared.study import Name


class Listen(Settings):
    """The one address that sites dial."""

    host: Host = "0.0.0.0"  # noqa: S104 - hospitals dial in from outside; TLS and client certificates guard it
    port: int = Field(default=9443, ge=0, le=65535)
    max_body_mb: float = Field(default=16.0, gt=0, le=1024)  # one request; models travel in pieces of 5 MiB


class TlsFiles(Settings):
    """Certificate files, PEM; the key must be readable by its owner only."""

    authority: LocalPath
    certificate: LocalPath
    key: LocalPath


class TrustFiles(Settings):
    """What decides who belongs to the consortium; the two keys must be readable by their owner only."""

    signing_key: LocalPath  # signs rosters and studies; its public half lies beside it, with .pub
    authority_key: LocalPath  # signs certificates; needed to approve, revoke and renew, and may lie offline otherwise
    roster: LocalPath  # folder of signed rosters, one file an epoch
    certificates: LocalPath  # folder of the sites' certificates, as issued
    revoked: LocalPath  # list of certificates that are no longer accepted


class ConsortiumSettings(Settings):
    """``consortium.yaml``."""

    consortium: Name
    listen: Listen = Listen()
    tls: TlsFiles
    trust: TrustFiles
    state: LocalPath
    studies: tuple[LocalPath, ...] = ()  # study files, submitted at each start; medfl-server submit does it later
    initial_weights: tuple[LocalPath, ...] = ()  # safetensors files that studies begin with, each by its SHA-256
    runs: LocalPath  # a folder for each study: model, metrics, checkpoints, logs
    health: LocalPort | None = None  # the gRPC health service, for Kubernetes and load balancers
    metrics: LocalPort | None = None  # Prometheus
    when_done: Literal["exit", "stay"] = "stay"  # stay: wait for further studies; exit: end after the last one


def consortium_file(given: Path | None) -> Path:
    """The configuration that a command is about: ``given``, else ``$MEDFL_CONSORTIUM``, else ./consortium.yaml.

    Raises:
        ConfigError: none was given and none is there.
    """
    if given is not None:
        return given
    if named := os.environ.get("MEDFL_CONSORTIUM"):
        return Path(named)
    path = Path("consortium.yaml")
    if not path.is_file():
        raise ConfigError("no consortium.yaml here: use --config FILE, set MEDFL_CONSORTIUM, or change the folder")
    return path


def load_consortium(given: Path | None, *, only_read: bool = False) -> ConsortiumSettings:
    """Read the file of :func:`consortium_file`; ``only_read``: for a command that changes nothing.

    Raises:
        ConfigError: one line per problem; or the consortium's folders are another account's.
    """
    settings = load_settings(consortium_file(given), ConsortiumSettings)
    if not only_read:
        for folder in (settings.state, settings.trust.roster):
            check_owner(folder)
    return settings
