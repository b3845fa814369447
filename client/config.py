"""What ``medfl-client --site`` reads: who we are, whom we call, where the images lie, what we allow."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, StrictBool

from medfl.client.data.settings import DataSettings
from medfl.client.policy import Policy
from medfl.shared.config import LocalPath, Settings
from medfl.shared.study import Name


class HealthSettings(Settings):
    """The gRPC health service for watchdogs and Kubernetes."""

    host: str = "127.0.0.1"
    port: int = Field(ge=0, le=65535)


class SecureAggregationSettings(Settings):
    """What this site needs for secure sums. Its minimum cohort is the policy's."""

    roster: LocalPath  # as the coordinator sent it; confirm it with medfl-client --confirm-roster
    allow_shrunk_repeat: StrictBool = False  # after a void sum: again with fewer sites, retrained


class SiteSettings(Settings):
    """``site.yaml``."""

    site: Name
    coordinator: str = Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$")  # host:port
    keys: LocalPath  # the folder that medfl-client keys made, with the two certificates that came back
    state: LocalPath
    data: DataSettings
    policy: Policy = Policy()  # absent: nothing is allowed
    secure_aggregation: SecureAggregationSettings | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024)  # of the CPU; absent: as PyTorch chooses
    health: HealthSettings | None = None
