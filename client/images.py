"""The images that a site trains on: loaded once for the studies that want the same, held until others are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData, TensorSet
from medfl.shared.errors import DataError
from medfl.shared.study import Study


class LoadData(Protocol):
    """Brings a study's images to the training device; raises DataError. Called once a study."""

    def __call__(self, study: Study, /) -> SiteData:
        """Load, or take from the cache."""
        ...


class Images:
    """``current`` gives the data less what may no longer be used: it is asked before every use, and what it gives is
    held instead.
    """

    def __init__(self, load: LoadData, current: Callable[[SiteData], SiteData] = lambda data: data) -> None:
        self._load, self._current = load, current
        self._held: tuple[str, SiteData] | None = None

    def split(self, study: Study, split: Split) -> TensorSet:
        """One part of them. Raises DataError: they cannot be loaded, or none is in that part."""
        held = self._held
        if held is None or held[0] != study.data_digest:
            self._held = None  # free the old images first
            self._held = held = (study.data_digest, self._load(study))
        current = self._current(held[1])
        if current is not held[1] and self._held is held:  # else it was let go of just now
            self._held = (held[0], current)
        data = current.splits.get(split)
        if data is None or len(data) == 0:
            raise DataError(f"no {split.value} images for study {study.name}: run medfl-client with --check")
        return data

    def forget(self) -> None:
        """Let go of them; from any thread."""
        self._held = None
