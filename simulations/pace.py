"""Sites that differ in speed, and sites that join late: a Grid whose answers come in the order of a simulated clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Error, Message
from flwr.serverapp import Grid

from medfl.shared.messages import Kind
from medfl.simulations.grid import VirtualGrid

NO_NODE = 3
"""A Flower code of a request that nobody answers; not one of those after which the coordinator waits for the site."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """A site's pace: ``slowness`` in training times of a usual site, and the first round it takes part in."""

    slowness: float = 1.0
    joins: int = 1


@dataclass(frozen=True, slots=True)
class _Due:
    """A message on its way, and when its answer comes."""

    at: float
    too_late: bool
    message: Message


class PacedGrid(Grid):
    """Gives the answers of ``grid`` in the order in which they would come, and counts the time that passes.

    Training takes as long as the site's rhythm says, everything else no time; a site does one thing after the other.
    With a ``deadline``, a slower answer is none: the site works, and the coordinator goes on without it.
    """

    def __init__(self, grid: VirtualGrid, rhythms: Mapping[str, Rhythm], *, deadline: float | None = None) -> None:
        self.clock = 0.0
        self.trained_at = 0.0  # when the last answer to a training request came
        self._grid = grid
        self._rhythms = rhythms
        self._deadline = deadline
        self._round = 0
        self._waiting: dict[str, _Due] = {}
        self._free: dict[int, float] = {}  # node -> when it has done what it was asked
        self._sent = 0

    def online(self) -> Mapping[int, str]:
        """Node id -> site name, of those that have joined."""
        return {node: name for node, name in self._grid.online().items() if self._rhythm(name).joins <= self._round + 1}

    def enrolled(self) -> Collection[str]:
        """All, joined or not."""
        return self._grid.enrolled()

    def joined(self) -> Mapping[int, str]:
        """None joins anew."""
        return dict.fromkeys(self.online(), "")

    def get_node_ids(self) -> Iterable[int]:
        """Those that have joined."""
        return list(self.online())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages and give them identities."""
        identities = []
        for message in messages:
            self._sent += 1
            identity = f"paced {self._sent}"
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            begins, takes = max(self.clock, self._free.get(node, 0.0)), 0.0
            if kind == Kind.TRAIN.value:
                takes = self._rhythm(self._grid.online()[node]).slowness
                number = message.content.config_records["config"]["server-round"]
                self._round = max(self._round, number if isinstance(number, int) else 0)
            ends, too_late = begins + takes, False
            if self._deadline is not None and takes > self._deadline:
                ends, too_late = self.clock + self._deadline, True
            else:
                self._free[node] = ends
            message.metadata.__dict__["_message_id"] = identity
            self._waiting[identity] = _Due(ends, too_late, message)
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let time pass until the next answer to one of the messages comes, and return it."""
        wanted = [identity for identity in message_ids if identity in self._waiting]
        if not wanted:
            return []
        identity = min(wanted, key=lambda one: (self._waiting[one].at, int(one.rpartition(" ")[2])))
        due = self._waiting.pop(identity)
        self.clock = max(self.clock, due.at)
        if due.message.metadata.message_type == Kind.TRAIN.value:
            self.trained_at = self.clock
        (inner,) = self._grid.push_messages([due.message])
        due.message.metadata.__dict__["_message_id"] = identity
        replies = list(self._grid.pull_messages([inner]))
        if due.too_late:
            return [Message(Error(NO_NODE, "simulated"), reply_to=due.message)]
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies, in the order in which they come."""
        identities = list(self.push_messages(messages))
        replies: list[Message] = []
        while len(replies) < len(identities):
            replies += self.pull_messages(identities)
        return replies

    def set_run(self, run: Any) -> None:
        """There is one run only."""

    @property
    def run(self) -> Any:
        """There is no run record."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Deprecated in Flower: construct ``flwr.app.Message`` instead."""
        raise NotImplementedError("construct flwr.app.Message")

    def _rhythm(self, name: str) -> Rhythm:
        return self._rhythms.get(name, Rhythm())
