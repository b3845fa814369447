"""One request to several sites: replies as they arrive, until all have come or the deadline has passed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from threading import Event

from flwr.app import Message
from flwr.serverapp import Grid

_POLL_S = 0.05


def exchange(grid: Grid, messages: Iterable[Message], *, deadline_s: float, stop: Event) -> Iterator[Message]:
    """Send ``messages`` and yield each reply once, in order of arrival.

    The messages' time-to-live is set to the deadline, so that a slow site does not work on what nobody waits for.
    Ends early when ``stop`` is set. A site that never answers yields nothing.
    """
    outgoing = list(messages)
    for message in outgoing:
        message.metadata.ttl = deadline_s
    pending = {identity for identity in grid.push_messages(outgoing) if identity}
    ends = time.monotonic() + deadline_s
    while pending and not stop.is_set():
        replies = list(grid.pull_messages(pending))
        for reply in replies:
            pending.discard(reply.metadata.reply_to_message_id)
            yield reply
        if time.monotonic() > ends:
            return
        if pending and not replies:
            stop.wait(_POLL_S)
