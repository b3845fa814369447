"""What ``medfl-client --site`` reads: who we are, whom we call, where the images lie, what we allow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, StrictBool, model_validator

from medfl.client.data.settings import DataSettings
from medfl.client.policy import Policy
from medfl.shared.addresses import Address
from medfl.shared.config import LocalPath, LocalPort, Settings, load_settings, parse_settings
from medfl.shared.errors import ConfigError
from medfl.shared.owner import check_owner
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
    coordinator: Address | None = None  # absent: where the signed roster says
    keys: LocalPath  # made by medfl-client enroll, completed by join
    state: LocalPath
    data: DataSettings
    policy: Policy = Policy()  # absent: nothing is allowed
    policy_file: LocalPath | None = None  # the policy in a file of its own, which root owns and the node only reads
    secure_aggregation: SecureAggregationSettings = SecureAggregationSettings()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_gigabytes: float | None = Field(default=None, ge=0)  # of images held on it; absent: half of what is free
    threads: int | None = Field(default=None, ge=1, le=1024)  # of the CPU; absent: as PyTorch chooses
    gpu: GpuSettings | None = None
    health: LocalPort | None = None  # the gRPC health service, for Kubernetes and load balancers
    metrics: LocalPort | None = None  # Prometheus

    @model_validator(mode="after")
    def _policy_of_its_own_file(self) -> SiteSettings:
        if self.policy_file is not None:
            if "policy" in self.model_fields_set:
                raise ValueError("give policy or policy_file, not both: two sets of rules could disagree")
            object.__setattr__(self, "policy", load_policy(self.policy_file))
        return self


def load_policy(path: Path) -> Policy:
    """Read a policy that only root can change.

    Raises:
        ConfigError: it cannot be read, is no policy, or somebody else than root could change it.
    """
    try:
        with path.open(encoding="utf-8") as file:
            about, text = os.fstat(file.fileno()), file.read()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path}: the policy cannot be read ({why}): policy_file names it") from None
    if about.st_uid != 0 or about.st_mode & 0o022:
        raise ConfigError(
            f"{path}: others than root could change the policy: chown root and chmod go-w, or write it under policy:"
        )
    return parse_settings(text, Policy, name=str(path), folder=path.parent)


def load_site(path: Path, *, writes: bool = False) -> SiteSettings:
    """Read ``site.yaml``; ``writes``: for a command that leaves something in the state folder.

    Raises:
        ConfigError: one line per problem; or the state folder is another account's.
    """
    settings = load_settings(path, SiteSettings)
    if writes and settings.state.exists():
        check_owner(settings.state)
    return settings
