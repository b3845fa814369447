"""A Grid that shows a strategy only the sites of one round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid


class CohortGrid(Grid):
    """Delegates to ``grid`` all but who is there: a strategy that samples from it takes exactly the cohort."""

    def __init__(self, grid: Grid, cohort: Mapping[int, str]) -> None:
        self._grid = grid
        self._cohort = cohort

    def get_node_ids(self) -> Iterable[int]:
        """The cohort's node ids."""
        return list(self._cohort)

    def set_run(self, run: Any) -> None:
        """As the grid does."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The grid's run."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """As the grid does."""
        return self._grid.create_message(*args, **kwargs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the grid does."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the grid does."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """As the grid does."""
        return self._grid.send_and_receive(messages, timeout=timeout)
