"""Many virtual sites in one process: a Grid whose messages are answered by a ClientApp as they are pulled.

The one file of the simulations that touches Flower's private ``TaskIdentity``, without which no Message can be made
outside a Flower process.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from typing import Any

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from medfl.shared.messages import Kind

FIRST_NODE = 2
"""Node id of the first site; the others follow in their order. Draws of sites depend on it."""

_RUN_ID, _TASK_ID, _SERVER_ID = 1, 1, 1


class VirtualGrid(Grid):
    """Holds each message until it is asked for, then lets one site after the other answer.

    One reply is in memory at a time, or as many as a moment brings: those of a small model cost less together.
    """

    def __init__(
        self, app: Callable[[Message, Context], Message], names: Iterable[str], *, moment_s: float = 0.02
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = _TASK_ID, _RUN_ID, _SERVER_ID
        self._app, self._moment_s = app, moment_s
        self._names = {node: name for node, name in enumerate(names, start=FIRST_NODE)}
        self._contexts: dict[int, Context] = {}
        self._waiting: OrderedDict[str, Message] = OrderedDict()
        self._sent = 0
        self._request: RecordDict | None = None

    def online(self) -> Mapping[int, str]:
        """Node id -> site name."""
        return self._names

    def enrolled(self) -> Collection[str]:
        """All of them."""
        return self._names.values()

    def joined(self) -> Mapping[int, str]:
        """All came at the beginning."""
        return dict.fromkeys(self._names, "")

    def get_node_ids(self) -> Iterable[int]:
        """All virtual nodes."""
        return list(self._names)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages and give them identities."""
        identities = []
        for message in messages:
            self._sent += 1
            identity = str(self._sent)
            message.metadata.__dict__["_message_id"] = identity
            self._waiting[identity] = message
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let one of the addressed sites work and return its reply; with those of others that are done in a moment."""
        wanted = message_ids if isinstance(message_ids, Set) else set(message_ids)
        replies: list[Message] = []
        until = time.monotonic() + self._moment_s
        for identity in [identity for identity in self._waiting if identity in wanted]:
            message = self._waiting.pop(identity)
            self._request = message.content if message.has_content() else None
            replies.append(self._app(message, self._context(message.metadata.dst_node_id)))
            if time.monotonic() >= until:
                break
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies, one site after the other."""
        identities = list(self.push_messages(messages))
        return [reply for identity in identities for reply in self.pull_messages([identity])]

    def companions(self) -> list[str]:
        """Sites that wait with the very request that is being answered now."""
        return [
            self._names[message.metadata.dst_node_id]
            for message in self._waiting.values()
            if message.content is self._request and message.metadata.message_type == Kind.TRAIN.value
        ]

    def set_run(self, run: Any) -> None:
        """There is one run only."""

    @property
    def run(self) -> Any:
        """There is no run record."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Deprecated in Flower: construct ``flwr.app.Message`` instead."""
        raise NotImplementedError("construct flwr.app.Message")

    def _context(self, node: int) -> Context:
        if node not in self._contexts:
            self._contexts[node] = Context(
                run_id=_RUN_ID,
                node_id=node,
                node_config={"site": self._names[node]},
                state=RecordDict(),
                run_config={},
            )
        return self._contexts[node]
