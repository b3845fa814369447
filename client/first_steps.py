"""The site.yaml that ``enroll`` writes where there is none: every key that matters, explained, and nothing allowed."""

from __future__ import annotations

from pathlib import Path

from medfl.shared.addresses import dialled
from medfl.shared.certificates import check_site_name
from medfl.shared.errors import ConfigError
from medfl.shared.keys import write_new

_TEXT = """\
# medfl-client --site {file}; relative paths count from this file's folder.
site: {name}
{coordinator}
keys: keys    # this site's private keys (0600): back them up, never send them
state: state  # ledger, audit log, cache, approvals: back it up together with keys
data:
  source: dicom
  folder: images  # where the DICOM files lie; see docs/data.md for a PACS, NIfTI, tables
  # split: {{validation: 0.15, test: 0.15, min_patients: 20}}
policy:  # what is absent is forbidden
  require_secure_aggregation: true
  # minimum_cohort: 4         # fewer sites are never summed with this one
  # max_epsilon_per_study: 8  # privacy budget of every patient
  # max_epsilon_total: 12
  # max_delta: 1e-5
  # allow_no_privacy: false
  # release_site_metrics: false
  # hours: ["mon-fri 19:00-06:00", "sat,sun"]
"""


def write_first_site_file(path: Path, *, name: str | None, coordinator: str | None) -> None:
    """Write ``path``. Raises ConfigError: no or a malformed name or address, or the file cannot be written."""
    if name is None:
        raise ConfigError(f"{path}: does not exist: to have it written, give --name, this site's name")
    check_site_name(name)
    if coordinator is not None:
        try:
            dialled(coordinator)
        except ValueError as wrong:
            raise ConfigError(f"--coordinator {coordinator[:80]}: {wrong}") from None
    line = f"coordinator: {coordinator}" if coordinator else "# coordinator: host:port  # absent: as the roster says"
    text = _TEXT.format(file=path.name, name=name, coordinator=line)
    write_new(path, text.encode(), mode=0o640)
