"""A sum whose survivors are fixed: everything the last two phases need, as it is kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.shared.secagg.announcement import Announcement
from medfl.shared.secagg.encoding import Encoding
from medfl.shared.secagg.messages import KeyList


@dataclass(frozen=True)
class PendingSum:
    """``vector`` is in the ring and ``scalars`` are uint64, both still masked. It can be finished, never changed."""

    announcement: Announcement
    encoding: Encoding
    key_list: KeyList
    commitments: Mapping[int, bytes]  # to the seed, of every sharer
    survivors: tuple[int, ...]  # U3, ascending
    vector: NDArray[Any]
    scalars: NDArray[np.uint64]

    @cached_property
    def context(self) -> bytes:
        """The announcement's context hash."""
        return self.announcement.context()

    @cached_property
    def key_list_digest(self) -> bytes:
        """In every signature of the last two phases."""
        return self.key_list.digest

    @property
    def sharers(self) -> tuple[int, ...]:
        """U2, ascending."""
        return tuple(sorted(self.commitments))
