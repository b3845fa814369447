"""One request to a cohort: good answers one by one as they arrive, a word about every other site."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Event

from flwr.app import Message
from flwr.serverapp import Grid

from medfl.server.admission import Admission
from medfl.server.exchange import NO_ANSWER, Exchange, cut_off, nodes_word
from medfl.server.pace import Pace
from medfl.server.reporter import Reporter
from medfl.shared.errors import BUDGET, Code, ProtocolError
from medfl.shared.messages import UNKNOWN_STUDY, Failure, outcome

log = logging.getLogger("medfl.server")

LOST = "unavailable"
MALFORMED = "malformed reply"


@dataclass(frozen=True)
class Stages:
    """What all stages of a study share."""

    grid: Grid
    reporter: Reporter
    stop: Event
    pace: Pace
    admission: Admission

    def run(
        self,
        number: int,
        name: str,
        messages: Sequence[Message],
        cohort: Mapping[int, str],
        outcomes: dict[str, str],
        *,
        take: Callable[[str, Message], str],
        quorum: int = 0,
    ) -> None:
        """Send ``messages`` and let ``take(site, reply)`` look at each answer that is no failure, once for each site.

        ``outcomes`` gets a word for every site: what ``take`` returns, or what went wrong. A ProtocolError of ``take``
        throws the answer away. Sites that were cut off are waited for while fewer than ``quorum`` have been taken, and
        as many still may be; a site that was late is left out until it has answered another offer of the study.
        """
        sites = [cohort[message.metadata.dst_node_id] for message in messages]
        outcomes.update(dict.fromkeys(sites, NO_ANSWER))
        done: dict[str, None] = {}  # in order of arrival
        taken = 0

        def enough(may_come: int) -> bool:
            return not taken < quorum <= taken + may_come

        self.reporter.stage(number, name, (), sites)
        exchange = Exchange(self.grid, self.pace, name, online=self.admission.online, stop=self.stop)
        for reply in exchange.run(messages, enough=enough):
            site = cohort.get(reply.metadata.src_node_id)
            if site is None or site in done:
                continue
            outcomes[site], final, good = self.sort(reply.metadata.src_node_id, site, reply, take)
            taken += good
            if final:
                done[site] = None
                self.reporter.stage(number, name, list(done), sites)
        for node in exchange.late:
            if cohort.get(node) not in done:
                self.admission.forget(node)

    def void(self, what: str, *why: object) -> None:
        """Log that something did not come about: as a warning, unless the study is being stopped."""
        log.log(logging.INFO if self.stop.is_set() else logging.WARNING, what, *why)

    def sort(self, node: int, site: str, reply: Message, take: Callable[[str, Message], str]) -> tuple[str, bool, bool]:
        """The word about ``reply``, whether it is the site's last, and whether ``take`` has taken it."""
        if reply.has_error():
            if cut_off(reply):
                return LOST, False, False
            word = nodes_word(reply)
            if word.startswith(Code.REFUSED):
                self.admission.forget(node)
            return word, True, False
        try:
            if outcome(reply.content) != "failed":
                return take(site, reply), True, True
            failure = Failure.parse(reply.content)
        except ProtocolError as error:
            log.warning("a reply was thrown away: %s", error)
            return MALFORMED, True, False
        if failure.code is Code.REFUSED and failure.reason == BUDGET:
            self.admission.has_spent(node)
        elif failure.code is Code.REFUSED or failure.reason == UNKNOWN_STUDY:
            self.admission.forget(node)
        return f"{failure.code.value}: {failure.reason}" if failure.reason else failure.code.value, True, False
