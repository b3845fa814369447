"""``Context.state`` of each run series on disk, so that it survives restarts and kill -9."""

from __future__ import annotations

import hashlib
from pathlib import Path

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Context, RecordDict

from medfl.client.fleet import read_state, state_bytes
from medfl.shared.errors import DataError
from medfl.shared.files import private_folder, write_whole


class SeriesStates:
    """``Context.state`` of each run series, one file each, whole or absent whatever is killed.

    A message whose handler fails leaves the state as it was before.
    """

    def __init__(self, state_dir: Path) -> None:
        self._folder = private_folder(state_dir)
        self._saved: dict[int, bytes] = {}

    def load(self, series_id: int) -> RecordDict:
        """The state after the last answered message of ``series_id``; empty for a new one.

        Raises:
            DataError: it is damaged.
        """
        path = self._path(series_id)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return RecordDict()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror})") from None
        try:
            return read_state(content)
        except Exception:  # whatever damaged bytes make Flower's parsers raise
            raise DataError(f"{path} is damaged: restore it from a backup, or move it away to start afresh") from None

    def save(self, context: Context) -> None:
        """Make ``context.state`` durable; costs nothing when it has not changed."""
        content = state_bytes(context)
        digest = hashlib.sha256(content).digest()
        if self._saved.get(context.series_id) != digest:
            write_whole(self._path(context.series_id), content)
            self._saved = {context.series_id: digest}

    def _path(self, series_id: int) -> Path:
        return self._folder / f"series-{series_id}.state"
