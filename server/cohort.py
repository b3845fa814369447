"""A Grid that shows a strategy only the sites of one round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.serverapp import Grid

from medfl.server.passing_grid import PassingGrid


class CohortGrid(PassingGrid):
    """As ``grid``, but for who is there: a strategy that samples from it takes exactly the cohort."""

    def __init__(self, grid: Grid, cohort: Mapping[int, str]) -> None:
        super().__init__(grid)
        self._cohort = cohort

    def get_node_ids(self) -> Iterable[int]:
        """The cohort's node ids."""
        return list(self._cohort)
