"""A Grid whose sites do what a test says: answer, refuse, stay silent, answer late or twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from medfl.shared.messages import EvaluateReply, Kind, ModelRequest, OfferAccepted, TrainReply
from medfl.shared.weights import Flat

Answer = RecordDict | Error | Sequence[RecordDict] | None

CUT_OFF = Error(5, "")
"""The link's word that a site was cut off with the request in hand."""


class ScriptedSite:
    """A site that accepts every study and answers each training request with ``update``, weighing ``examples``."""

    def __init__(self, update: float | Flat = 0.0, examples: int = 1) -> None:
        self.update = update
        self.examples = examples
        self.late_s = 0.0
        self.rounds: list[int] = []
        self.seen: list[Flat] = []

    def __call__(self, message: Message) -> Answer:
        """Records to reply with; None for silence."""
        match message.metadata.message_type:
            case Kind.OFFER.value:
                return self.consider(message.content)
            case Kind.TRAIN.value:
                request = ModelRequest.parse(message.content)
                self.rounds.append(request.round)
                self.seen.append(request.weights)
                return self.train(request)
            case _:
                return self.evaluate(ModelRequest.parse(message.content))

    def consider(self, content: RecordDict) -> Answer:
        return OfferAccepted().record()

    def train(self, request: ModelRequest) -> Answer:
        update = np.full_like(request.weights, self.update) if isinstance(self.update, float) else self.update
        return TrainReply(update, self.examples).record()

    def evaluate(self, request: ModelRequest) -> Answer:
        return EvaluateReply().record()


class ScriptedGrid(Grid):
    """Grid and directory over scripted sites; replies arrive in the order of ``arrange`` and no sooner than asked."""

    def __init__(
        self,
        sites: Mapping[str, Callable[[Message], Answer]],
        *,
        arrange: Callable[[list[Message]], list[Message]] = lambda replies: replies,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self._sites = sites
        self._names = dict(enumerate(sites, start=2))
        self._arrange = arrange
        self._ready: list[tuple[float, Message]] = []
        self._sent = 0
        self.offline: set[str] = set()
        self.asked: list[tuple[str, str]] = []  # (site, message type), in order
        self.times_to_live: list[float] = []
        self.sessions: dict[str, str] = {}  # site -> when it joined last

    def online(self) -> Mapping[int, str]:
        return {node: name for node, name in self._names.items() if name not in self.offline}

    def enrolled(self) -> Collection[str]:
        return self._names.values()

    def joined(self) -> Mapping[int, str]:
        return {node: self.sessions.get(name, "first") for node, name in self.online().items()}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.online())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities: list[str] = []
        replies: list[tuple[float, Message]] = []
        for message in messages:
            self._sent += 1
            identity = f"message {self._sent}"
            message.metadata.__dict__["_message_id"] = identity
            identities.append(identity)
            name = self._names[message.metadata.dst_node_id]
            self.asked.append((name, message.metadata.message_type))
            self.times_to_live.append(message.metadata.ttl)
            answer = self._sites[name](message)
            late = getattr(self._sites[name], "late_s", 0.0)
            contents = [answer] if isinstance(answer, RecordDict | Error) else answer or []
            replies += [(late, Message(content, reply_to=message)) for content in contents]
        order = {id(m): n for n, m in enumerate(self._arrange([message for _, message in replies]))}
        replies.sort(key=lambda pair: (pair[0], order[id(pair[1])]))  # also where several are due when it is asked
        now = time.monotonic()
        self._ready += [(now + late, message) for late, message in replies]
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted, now = set(message_ids), time.monotonic()
        due = [pair for pair in self._ready if pair[0] <= now and pair[1].metadata.reply_to_message_id in wanted]
        self._ready = [pair for pair in self._ready if pair not in due]
        return [message for _, message in due]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError
