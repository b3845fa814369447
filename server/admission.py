"""Which sites take part in a study: each that comes online is offered it, again when it forgot or refused."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from medfl.server.exchange import cut_off, nodes_word
from medfl.shared.errors import BUDGET, Code, ProtocolError
from medfl.shared.messages import NO_INITIAL_WEIGHTS, Failure, Kind, OfferAccepted, StudyOffer, outcome
from medfl.shared.study import Study

_LACKING = f"{Code.PROTOCOL.value}: {NO_INITIAL_WEIGHTS}"
_ASK_AGAIN_S = (10.0, 300.0)  # first and longest pause: a site may have to read all its images to say no again


class Directory(Protocol):
    """Who is there."""

    def online(self) -> Mapping[int, str]:
        """Node id -> site name, of all enrolled sites that are connected now; who changes that gives a new mapping."""
        ...

    def enrolled(self) -> Collection[str]:
        """Names of all sites of the consortium, connected or not."""
        ...

    def joined(self) -> Mapping[int, str]:
        """Node id -> when it came online last, in whatever words, of those that are connected now."""
        ...


@dataclass(frozen=True, slots=True)
class _Offer:
    """An offer that has not been answered."""

    node: int
    site: str
    expires: float
    session: str  # of the site, when it was sent


class Admission:
    """Offers the study without waiting, and collects the answers whenever it is asked."""

    def __init__(
        self, study: Study, grid: Grid, directory: Directory, signature: bytes = b"", initial: bytes | None = None
    ) -> None:
        """``initial`` is the file of the weights the study begins with, for sites that have none yet."""
        self._study = study
        self._signature = signature
        self._initial = initial
        self._lacking: set[int] = set()  # nodes that have asked for that file, and are offered the study with it
        self._grid = grid
        self._directory = directory
        self._accepted: set[int] = set()
        self._part: tuple[Mapping[int, str], Mapping[int, str]] | None = None  # who was online, and took part of them
        self._offered: dict[str, _Offer] = {}  # by message id
        self._ask_after: dict[int, float] = {}
        self._pause_s: dict[int, float] = {}
        self._refused_in: dict[int, str] = {}  # node -> its session in which it refused
        self._spent: set[int] = set()
        self.refusals: dict[str, str] = {}  # site -> why not, in the site's own code words

    def refresh(self) -> None:
        """Offer to whoever is new or due again, and take in what has been answered."""
        online, now = self._directory.online(), time.monotonic()
        part = self._part
        if part is not None and part[0] is online and len(part[1]) == len(online) and not self._offered:
            return  # the same sites as before, and all of them take part
        self._collect(online, now)
        self._welcome_back()
        waiting = {offer.node for offer in self._offered.values()}
        due = [
            node
            for node in sorted(online.keys() - self._accepted - self._spent)
            if node not in waiting and now >= self._ask_after.get(node, 0.0)
        ]
        if due:
            self._offer(due, online, now)
            self._collect(online, now)

    def _welcome_back(self) -> None:
        """Ask a site that refused and has joined anew without a pause: somebody there may have approved the study."""
        if not self._refused_in:
            return
        joined = self._directory.joined()
        for node in [node for node, session in self._refused_in.items() if joined.get(node, session) != session]:
            for memory in (self._refused_in, self._ask_after, self._pause_s):
                memory.pop(node, None)

    def online(self) -> Mapping[int, str]:
        """Node id -> site name, of all that are connected now."""
        return self._directory.online()

    def taking_part(self) -> Mapping[int, str]:
        """Node id -> name of the sites that accepted and are online, in order of node id."""
        online = self._directory.online()
        if self._part is None or self._part[0] is not online:
            self._part = online, {node: online[node] for node in sorted(self._accepted) if node in online}
        return self._part[1]

    @property
    def awaited(self) -> int:
        """Number of sites that have been asked and have not answered."""
        return len(self._offered)

    def forget(self, node: int) -> None:
        """Offer again to ``node``: it does not know the study any more, does not work at this hour, or was too late.

        A node answers one message after the other: once it accepts the study again, it is free.
        """
        self._accepted.discard(node)
        self._part = None

    def has_spent(self, node: int) -> None:
        """Ask ``node`` no more: this study's price is beyond what it allows. A restarted coordinator asks again."""
        self._accepted.discard(node)
        self._part = None
        self._spent.add(node)
        if name := self.online().get(node):
            self.refusals[name] = f"{Code.REFUSED.value}: {BUDGET}"

    def may_still_be(self, needed: int) -> bool:
        """Whether ``needed`` sites could still take part, now or later, after those that have spent their budget."""
        return not self._spent or len(self._directory.enrolled()) - len(self._spent) >= needed

    def _offer(self, nodes: list[int], online: Mapping[int, str], now: float) -> None:
        offer = StudyOffer(self._study.digest, self._study.canonical(), self._signature)
        bare = offer.record()
        full = replace(offer, initial=self._initial or b"").record() if self._lacking else bare
        deadline, joined = self._study.rounds.deadline_s, self._directory.joined()
        messages = [
            Message(
                full if node in self._lacking else bare,
                dst_node_id=node,
                message_type=Kind.OFFER.value,
                ttl=deadline,
            )
            for node in nodes
        ]
        for node, identity in zip(nodes, self._grid.push_messages(messages), strict=True):
            self._offered[identity] = _Offer(node, online[node], now + deadline, joined.get(node, ""))

    def _collect(self, online: Mapping[int, str], now: float) -> None:
        while replies := list(self._grid.pull_messages(set(self._offered))):
            for reply in replies:
                self._take(reply, now)
        offered = self._offered.items()
        gone = [identity for identity, offer in offered if now > offer.expires or offer.node not in online]
        for identity in gone:
            del self._offered[identity]

    def _take(self, reply: Message, now: float) -> None:
        asked = self._offered.pop(reply.metadata.reply_to_message_id, None)
        if asked is None:
            return
        node, name = asked.node, asked.site
        if cut_off(reply):
            return  # it is offered the study again as soon as it is back
        if (why := _refusal(reply)) == f"{Code.REFUSED.value}: {BUDGET}":
            self.has_spent(node)
        elif why == _LACKING and self._initial is not None and node not in self._lacking:
            self._lacking.add(node)
        elif why:
            self._lacking.discard(node)
            self.refusals[name] = why
            self._refused_in[node] = asked.session
            pause = self._pause_s.get(node, _ASK_AGAIN_S[0])
            self._ask_after[node], self._pause_s[node] = now + pause, min(2 * pause, _ASK_AGAIN_S[1])
        else:
            self._accepted.add(node)
            self._part = None
            self._lacking.discard(node)
            self._pause_s.pop(node, None)
            self.refusals.pop(name, None)


def _refusal(reply: Message) -> str | None:
    """Why the site does not take part, or None when it does."""
    if reply.has_error():
        return nodes_word(reply)
    try:
        if outcome(reply.content) == "failed":
            failure = Failure.parse(reply.content)
            return f"{failure.code.value}: {failure.reason}" if failure.reason else failure.code.value
        OfferAccepted.parse(reply.content)
    except ProtocolError:
        return "malformed answer"
    return None
