"""A coordinator of this release and a site of the one before, over the real link."""

from __future__ import annotations

import threading

import numpy as np
from federation import Lab, until
from flwr.app import ConfigRecord, Context, Message, RecordDict

from medfl.server.negotiation import NegotiatingGrid
from medfl.shared.errors import Code
from medfl.shared.messages import PROTOCOL, Failure, ModelRequest, Ready, outcome, protocol_of

DIGEST = "d" * 64
VECTOR = np.zeros(3, np.float32)


def in_older_words(content: RecordDict) -> RecordDict:
    return RecordDict({**content, "config": ConfigRecord({**content["config"], "protocol": PROTOCOL - 1})})


class OlderSite:
    """Reads its own protocol only, and knows no later field."""

    def __init__(self) -> None:
        self.read: list[int | None] = []

    def __call__(self, message: Message, context: Context) -> Message:
        version, fields = protocol_of(message.content), set(message.content["config"])
        self.read.append(version)
        good = version == PROTOCOL - 1 and fields <= {"study", "server-round", "protocol", "encoding"}
        reply = Ready().record() if good else Failure(Code.PROTOCOL).record()
        return Message(in_older_words(reply), reply_to=message)


def ask(grid: NegotiatingGrid, nodes: list[int]) -> dict[int, str]:
    content = ModelRequest(DIGEST, 1, VECTOR, counted=0).record()
    messages = [Message(content, dst_node_id=node, message_type="train") for node in nodes]
    return {reply.metadata.src_node_id: outcome(reply.content) for reply in grid.send_and_receive(messages, timeout=60)}


def test_an_older_site_is_written_to_in_its_own_protocol_from_the_second_message_on(lab: Lab) -> None:
    older, newer_read = OlderSite(), []

    def newer(message: Message, context: Context) -> Message:
        newer_read.append(protocol_of(message.content))
        return Message(Ready().record(), reply_to=message)

    link = lab.link(sites=2)
    ids = link.enrol(lab.roster(2))
    lab.node("north", link.port, older)
    lab.node("south", link.port, newer)
    until(lambda: link.online() == set(ids.values()))
    with link.run(None, name="study", digest=DIGEST) as run:
        grid, nodes = NegotiatingGrid(run.grid), list(ids.values())
        assert ask(grid, nodes) == {ids["north"]: "failed", ids["south"]: "ready"}
        for _ in range(2):
            assert ask(grid, nodes) == {ids["north"]: "ready", ids["south"]: "ready"}
    assert older.read == [PROTOCOL, PROTOCOL - 1, PROTOCOL - 1]
    assert newer_read == [PROTOCOL] * 3


def test_a_site_that_has_been_updated_is_written_to_in_the_new_protocol_again(lab: Lab) -> None:
    older = OlderSite()
    updated = threading.Event()

    def site(message: Message, context: Context) -> Message:
        if updated.is_set():
            older.read.append(protocol_of(message.content))
            return Message(Ready().record(), reply_to=message)
        return older(message, context)

    with lab.federation(site, sites=1) as (link, ids), link.run(None, name="study", digest=DIGEST) as run:
        grid, nodes = NegotiatingGrid(run.grid), list(ids.values())
        ask(grid, nodes)
        ask(grid, nodes)
        updated.set()
        ask(grid, nodes)
        ask(grid, nodes)
    assert older.read == [PROTOCOL, PROTOCOL - 1, PROTOCOL - 1, PROTOCOL]
