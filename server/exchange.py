"""One request to several sites: replies as they arrive, until all have come or each site's time is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from threading import Event

from flwr.app import Message
from flwr.serverapp import Grid

from medfl.server.pace import Pace
from medfl.shared.errors import Code

NO_ANSWER = "no answer"
"""Outcome of a site that was silent."""

_POLL_S = 0.05
_RETURN_S = 20.0  # a site that was cut off is back in less, or is down
_TIMES = 5  # so often a site is asked the same: what kills it every time is not asked for ever
_CUT_OFF = (4, 5)  # Flower's codes of a reply that stopped arriving, and of a node that left


def cut_off(reply: Message) -> bool:
    """Whether ``reply`` is the link's word that the site was cut off with the request in hand."""
    return reply.has_error() and reply.error.code in _CUT_OFF


def nodes_word(reply: Message) -> str:
    """What a node says in place of its app, a code with a reason; of a request that has expired, that it is silent."""
    word = str(reply.error.reason or "")
    return word[:80] if word.partition(":")[0] in set(Code) and word.isprintable() else NO_ANSWER


@dataclass(slots=True)
class _Asked:
    """One site's request."""

    message: Message
    began: float
    until: float
    times: int = 1  # it was sent


class Exchange:
    """Sends requests once, and again to a site that was cut off and came back; gives each reply once.

    A site's time is what ``pace`` allows it, and what it took goes there. Messages live no longer than that, so that a
    slow site does not work on what nobody waits for. ``late`` holds the nodes whose time was over.
    """

    def __init__(
        self, grid: Grid, pace: Pace, stage: str, *, online: Callable[[], Mapping[int, str]], stop: Event
    ) -> None:
        self._grid, self._pace, self._stage = grid, pace, stage
        self._online, self._stop = online, stop
        self._asked: dict[str, _Asked] = {}  # by message id
        self._lost: list[_Asked] = []
        self.late: list[int] = []

    def run(
        self, messages: Iterable[Message], *, enough: Callable[[int], bool] = lambda may_come: True
    ) -> Iterator[Message]:
        """Send ``messages`` and yield each reply in order of arrival. A site that never answers yields nothing.

        A site that was lost yields an error, and its reply if it comes back in time. Such sites are waited for only
        while ``enough(n)``, where n of them may still come, is False.

        Who stops taking replies may call it again: those that are still awaited come among the new ones.
        """
        now = time.monotonic()
        ends = now + self._pace.deadline_s
        self._send([_Asked(message, now, now) for message in messages], ends)
        while (self._asked or self._lost) and not self._stop.is_set():
            replies = list(self._grid.pull_messages(self._asked.keys()))
            for reply in replies:
                if (asked := self._asked.pop(reply.metadata.reply_to_message_id, None)) is not None:
                    self._note(asked, reply, ends)
                    yield reply
            if not replies:
                self._give_up()
                self._ask_again(ends)
                if not self._asked and enough(len(self._lost)):
                    return
                if self._asked or self._lost:
                    self._stop.wait(_POLL_S)

    @property
    def waits_for(self) -> set[int]:
        """Nodes that were asked and whose reply may still come."""
        return {asked.message.metadata.dst_node_id for asked in (*self._asked.values(), *self._lost)}

    def _note(self, asked: _Asked, reply: Message, ends: float) -> None:
        now = time.monotonic()
        if not cut_off(reply):
            self._pace.took(self._stage, asked.message.metadata.dst_node_id, now - asked.began)
        elif asked.times < _TIMES:
            asked.until = min(ends, max(asked.until, now + _RETURN_S))
            self._lost.append(asked)

    def _give_up(self) -> None:
        now = time.monotonic()
        for identity, asked in list(self._asked.items()):
            if now > asked.until:
                del self._asked[identity]
                node = asked.message.metadata.dst_node_id
                self._pace.missed(self._stage, node)
                self.late.append(node)
        self._lost = [asked for asked in self._lost if now <= asked.until]

    def _ask_again(self, ends: float) -> None:
        if not self._lost:
            return
        online = self._online()
        back = [asked for asked in self._lost if asked.message.metadata.dst_node_id in online]
        self._lost = [asked for asked in self._lost if asked not in back]
        for asked in back:
            asked.times += 1
        self._send(back, ends)

    def _send(self, requests: list[_Asked], ends: float) -> None:
        now = time.monotonic()
        for asked in requests:
            allowed = self._pace.allows(self._stage, asked.message.metadata.dst_node_id)
            if asked.times > 1:
                allowed = max(min(allowed, ends - now), _POLL_S)
            asked.began, asked.until = now, now + allowed
            asked.message.metadata.ttl = allowed
        identities = self._grid.push_messages([asked.message for asked in requests]) if requests else ()
        self._asked |= {identity: asked for identity, asked in zip(identities, requests, strict=False) if identity}
