"""What ``medfl-client --site`` reads: who we are, whom we call, where the images lie, what we allow."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, StrictBool

from medfl.client.data.settings import DataSettings
from medfl.client.policy import Policy
from medfl.shared.config import LocalPath, LocalPort, Settings, load_settings
from medfl.shared.consortium import ADDRESS
from medfl.shared.study import Name


class GpuSettings(Settings):
    """``gpu:`` in site.yaml; only where the training device is one."""

    yield_to_others: StrictBool = True  # begin no training, and pause one, while another process is on the device
    min_free_mb: float = Field(default=0.0, ge=0)  # begin no training with less free memory than this
    memory_fraction: float = Field(default=1.0, gt=0, le=1)  # of the device: more is never taken
    look_every_s: float = Field(default=5.0, gt=0, le=3600)


class SecureAggregationSettings(Settings):
    """The site's own rules for secure sums. Its minimum cohort is the policy's, its roster the consortium's."""

    allow_shrunk_repeat: StrictBool = False  # after a void sum: again with fewer sites, retrained


class SiteSettings(Settings):
    """``site.yaml``."""

    site: Name
    coordinator: str | None = Field(default=None, pattern=ADDRESS)  # absent: where the signed roster says
    keys: LocalPath  # made by medfl-client enroll, completed by join
    state: LocalPath
    data: DataSettings
    policy: Policy = Policy()  # absent: nothing is allowed
    secure_aggregation: SecureAggregationSettings = SecureAggregationSettings()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_gigabytes: float | None = Field(default=None, ge=0)  # of images held on it; absent: half of what is free
    threads: int | None = Field(default=None, ge=1, le=1024)  # of the CPU; absent: as PyTorch chooses
    gpu: GpuSettings | None = None
    health: LocalPort | None = None  # the gRPC health service, for Kubernetes and load balancers
    metrics: LocalPort | None = None  # Prometheus


def load_site(path: Path) -> SiteSettings:
    """Read ``site.yaml``. Raises ConfigError, one line per problem."""
    return load_settings(path, SiteSettings)
