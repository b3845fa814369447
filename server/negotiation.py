"""A Grid that speaks to each site in the newest protocol both sides know: this release's, or the one before.

A site that is older answers the first message with its own version, whatever else it makes of it; from then on it is
written to in that version. Nothing is kept: after a restart the first answer tells again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from medfl.server.passing_grid import PassingGrid
from medfl.shared.messages import PROTOCOL, protocol_of, written_as

log = logging.getLogger("medfl.server")


class NegotiatingGrid(PassingGrid):
    """As ``grid``, but rewrites what goes to older sites and learns from what comes back."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self._older: dict[int, int] = {}  # node id -> the protocol it speaks

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send each message as its receiver can read it."""
        return self._grid.push_messages(self._as_read(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answers, each of which tells its sender's protocol."""
        for reply in self._grid.pull_messages(message_ids):
            self._learn(reply)
            yield reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Both."""
        for reply in self._grid.send_and_receive(self._as_read(messages), timeout=timeout):
            self._learn(reply)
            yield reply

    def _as_read(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            if (version := self._older.get(message.metadata.dst_node_id)) is not None:
                message.content = written_as(message.content, version)
            yield message

    def _learn(self, reply: Message) -> None:
        if reply.has_error() or (version := protocol_of(reply.content)) is None:
            return
        node = reply.metadata.src_node_id
        if version == PROTOCOL:
            self._older.pop(node, None)  # it has been updated
        elif version == PROTOCOL - 1 and self._older.get(node) != version:
            self._older[node] = version
            log.info("a site speaks protocol %d, this release %d: it is written to in its own", version, PROTOCOL)
