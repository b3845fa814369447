"""The phases of a secure sum over Flower messages: who was asked, who answered, how many uploads at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from flwr.app import Message

from medfl.server.secagg.outcome import SumVoid
from medfl.server.stage import Stages
from medfl.shared.errors import ProtocolError
from medfl.shared.messages import Failure, Kind, SecureReply, SecureRequest, outcome
from medfl.shared.secagg.exchange import Phase, PhaseReply, PhaseRequest, SiteRefusal

_UPLOADS = 4  # masked vectors on their way at a time,
_UPLOAD_BYTES = 256 * 1024 * 1024  # and so much of them; one in any case


class GridExchange:
    """Carries the phases of a secure sum over a Flower grid: a request is asked of a node, its reply authenticated by
    the node's key. Masked vectors, of ``vector_bytes`` each, are let in a few at a time, so that few lie in the object
    store at once, and are taken out of it one by one.
    """

    def __init__(self, stages: Stages, nodes: Mapping[int, int], *, deadline_s: float, vector_bytes: int = 0) -> None:
        self._stages = stages
        self._uploads = min(_UPLOADS, max(1, _UPLOAD_BYTES // max(1, vector_bytes)))
        self._nodes = nodes  # site id -> node id
        self._deadline_s = deadline_s

    def __call__(
        self, phase: Phase, requests: Mapping[int, PhaseRequest], /
    ) -> Iterator[tuple[int, PhaseReply | SiteRefusal]]:
        """Send ``requests`` (by site id) and yield the answers until the deadline; see the protocol's Exchange.

        Raises:
            SumVoid: the study is being stopped; sites that have not answered are not at fault.
        """
        waiting = [site for site in requests if site in self._nodes]
        large = phase is Phase.MASKED_INPUT
        at_once = self._uploads if large else len(waiting)
        asked: dict[str, tuple[int, float]] = {}  # message id -> site, when it is given up
        grid, stop = self._stages.grid, self._stages.stop
        while (waiting or asked) and not stop.is_set():
            while waiting and len(asked) < at_once:
                site = waiting.pop(0)
                message = Message(
                    SecureRequest(phase, requests[site].control).record(),
                    dst_node_id=self._nodes[site],
                    message_type=Kind.PHASE.value,
                    ttl=self._deadline_s,
                )
                (identity,) = grid.push_messages([message])
                asked[identity] = (site, time.monotonic() + self._deadline_s)
            idle = True
            for identities in [{identity} for identity in asked] if large else [set(asked)]:
                replies = list(grid.pull_messages(identities))
                while replies:
                    idle, reply = False, replies.pop()
                    known = asked.pop(reply.metadata.reply_to_message_id, None)
                    if known is not None and reply.metadata.src_node_id == self._nodes[known[0]]:
                        yield known[0], _read(reply)
                    del reply  # or it would lie here while the next one is taken
            now = time.monotonic()
            asked = {identity: (site, ends) for identity, (site, ends) in asked.items() if now < ends}
            if asked and idle:
                stop.wait(0.02)
        if waiting or asked:
            raise SumVoid("the study is being stopped", confirmed=False)


def _read(reply: Message) -> PhaseReply | SiteRefusal:
    if reply.has_error():
        return SiteRefusal.of(ProtocolError("", reason="unavailable"))
    try:
        if outcome(reply.content) == "failed":
            failure = Failure.parse(reply.content)
            return SiteRefusal(failure.code, failure.reason)
        return SecureReply.parse(reply.content).reply
    except ProtocolError:
        return SiteRefusal.of(ProtocolError("", reason="malformed reply"))
