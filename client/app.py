"""The site's ClientApp: Flower messages in, a :class:`~medfl.client.site.Site` at work, Flower messages out.

The same app runs under MedFL's own node, under Flower's SuperNode and simulation, and in ``medfl-sim``.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Protocol

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from medfl.client import trouble
from medfl.client.site import Site
from medfl.client.witness import Witness
from medfl.shared.errors import Code, MedFLError
from medfl.shared.fields import read_config
from medfl.shared.messages import Failure, HeadsRequest, ModelRequest, SecureRequest, StudyOffer, WeightRequest

log = logging.getLogger("medfl.site")


class _Reply(Protocol):
    def record(self) -> RecordDict: ...


def build_client_app(
    site_of: Callable[[Context], Site],
    *,
    witness: Witness | None = None,
    on_device_lost: Callable[[], None] = lambda: None,
) -> ClientApp:
    """A ClientApp that lets the site of each message's context answer it; ``witness`` logs it (virtual sites: None).

    ``on_device_lost`` is called when the training device will not answer in this process any more.
    """
    app = ClientApp()

    def answer(message: Message, work: Callable[[], _Reply]) -> Message:
        content = _witnessed(message, work, witness)
        match read_config(content, None).get("reason"):
            case trouble.OUT_OF_MEMORY:
                trouble.free_memory()
            case trouble.DEVICE_LOST:
                on_device_lost()
        return Message(content, reply_to=message)

    @app.query("offer")
    def offer(message: Message, context: Context) -> Message:
        return answer(message, lambda: site_of(context).consider(StudyOffer.parse(message.content)))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, lambda: site_of(context).train(ModelRequest.parse(message.content)))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, lambda: site_of(context).evaluate(ModelRequest.parse(message.content)))

    @app.query("weight")
    def weight(message: Message, context: Context) -> Message:
        return answer(message, lambda: site_of(context).hold_weight(WeightRequest.parse(message.content)))

    @app.query("ledger")
    def heads(message: Message, context: Context) -> Message:
        def work() -> _Reply:
            request = HeadsRequest.parse(message.content)
            reply = site_of(context).compare_heads(request)
            return reply if witness is None else witness.countersigned(request, reply)

        return answer(message, work)

    @app.query("phase")
    def phase(message: Message, context: Context) -> Message:
        return answer(message, lambda: site_of(context).secure_phase(SecureRequest.parse(message.content)))

    return app


def _witnessed(message: Message, work: Callable[[], _Reply], witness: Witness | None) -> RecordDict:
    """The reply, on the disk of the audit log before it leaves, as the message is before any work on it."""
    if witness is None:
        return _content(message, work)
    passage = witness.passage(message)

    def logged() -> _Reply:
        witness.received(passage, message.content)
        return work()

    content = _content(message, logged)
    try:
        witness.leaves(passage, content)
    except MedFLError as error:
        log.error("%s: nothing leaves: %s", message.metadata.message_type, error)
        return Failure(error.code, error.reason).record()
    return content


def _content(message: Message, work: Callable[[], _Reply]) -> RecordDict:
    """What ``work`` returns, or the code of what it raises. No exception text leaves the site."""
    try:
        return work().record()
    except MedFLError as error:
        log.warning("%s: %s", message.metadata.message_type, error)
        return Failure(error.code, error.reason).record()
    except Exception as error:
        if (known := trouble.in_words(error)) is not None:
            log.error("%s: %s", message.metadata.message_type, known)
            return Failure(known.code, known.reason).record()
        # The text of a library's error may hold a path or a header: only where it happened is logged.
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s: unexpected %s at\n%s", message.metadata.message_type, type(error).__name__, frames)
        return Failure(Code.UNEXPECTED, type(error).__name__).record()
