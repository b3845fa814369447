"""One request to a cohort: good answers one by one as they arrive, a word about every other site."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event

from flwr.app import Message
from flwr.serverapp import Grid

from medfl.server.exchange import exchange
from medfl.server.reporter import Reporter
from medfl.shared.errors import PASSING, ProtocolError
from medfl.shared.messages import UNKNOWN_STUDY, Failure, outcome

log = logging.getLogger("medfl.server")

NO_ANSWER = "no answer"
MALFORMED = "malformed reply"


@dataclass(frozen=True)
class Stages:
    """What all stages of a study share."""

    grid: Grid
    reporter: Reporter
    stop: Event
    deadline_s: float
    forget: Callable[[int], None]  # called with the node to be offered the study again

    def run(
        self,
        number: int,
        name: str,
        messages: Sequence[Message],
        cohort: Mapping[int, str],
        outcomes: dict[str, str],
        *,
        take: Callable[[str, Message], str],
    ) -> None:
        """Send ``messages`` and let ``take(site, reply)`` look at each answer that is no failure, once for each site.

        ``outcomes`` gets a word for every site: what ``take`` returns, or what went wrong. A ProtocolError of ``take``
        throws the answer away.
        """
        outcomes.update(dict.fromkeys((cohort[m.metadata.dst_node_id] for m in messages), NO_ANSWER))
        done: list[str] = []
        self.reporter.stage(number, name, done, list(outcomes))
        for node, reply in self._answers(messages, cohort):
            site = cohort[node]
            if site in done:
                continue
            done.append(site)
            outcomes[site] = self._sort(node, site, reply, take)
            self.reporter.stage(number, name, done, list(outcomes))

    def _answers(self, messages: Sequence[Message], cohort: Mapping[int, str]) -> Iterator[tuple[int, Message]]:
        for reply in exchange(self.grid, messages, deadline_s=self.deadline_s, stop=self.stop):
            if reply.metadata.src_node_id in cohort:
                yield reply.metadata.src_node_id, reply

    def _sort(self, node: int, site: str, reply: Message, take: Callable[[str, Message], str]) -> str:
        if reply.has_error():
            return "unavailable"
        try:
            if outcome(reply.content) != "failed":
                return take(site, reply)
            failure = Failure.parse(reply.content)
        except ProtocolError as error:
            log.warning("a reply was thrown away: %s", error)
            return MALFORMED
        if failure.reason in PASSING | {UNKNOWN_STUDY}:
            self.forget(node)
        return f"{failure.code.value}: {failure.reason}" if failure.reason else failure.code.value
