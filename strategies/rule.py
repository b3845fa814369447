"""Between Flower's strategies and an algorithm that is one pure function on flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import nan

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from medfl.shared.errors import ProtocolError
from medfl.shared.messages import TENSOR, pack
from medfl.shared.weights import Flat

Memory = Mapping[str, NDArray[np.float32]]
"""What an algorithm carries from round to round at the coordinator; goes into the checkpoint."""


@dataclass(frozen=True, slots=True)
class Update:
    """What one site (or the mean of all) sent: its update, what goes beside it, and how many examples it stands for."""

    step: Flat
    beside: Flat
    examples: float
    loss: float = nan  # mean training loss; NaN where the site keeps it


@dataclass(frozen=True, slots=True)
class Turn:
    """One round as an algorithm sees it: the model that was sent, what came back, for which share (weight) of all."""

    sent: Flat
    updates: tuple[Update, ...]
    share: float = 1.0

    @property
    def mean(self) -> Update:
        """The one virtual update of a round that was summed."""
        (mean,) = self.updates
        return mean


Rule = Callable[[Turn, Memory], tuple[Flat, Memory]]
"""From a round and the memory before it to the new model and the memory after it."""


class RuleStrategy(FedAvg):
    """A Flower strategy around a :data:`Rule`. Its replies hold updates, not weights.

    ``sends`` names the vector of the memory that travels beside the model (zeros before the first round). ``share`` is
    to be set before the replies are aggregated: for what part of all sites, by weight, they stand.
    """

    def __init__(self, rule: Rule, *, sends: str | None = None) -> None:
        super().__init__(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
        self.memory: dict[str, NDArray[np.float32]] = {}
        self._rule = rule
        self._sends = sends
        self._sent: Flat | None = None
        self.share = 1.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The model, and what goes beside it, to every node of ``grid``."""
        self._sent = np.array(arrays[TENSOR].numpy(), np.float32)
        if self._sends is not None:
            beside = self.memory.get(self._sends, np.zeros_like(self._sent))
            arrays = pack(np.concatenate([self._sent, beside]))
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The step of the model that the rule makes; None without replies. Raises ProtocolError on a wrong length."""
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        if not valid or self._sent is None:
            return None, None
        updates = tuple(_update(message, self._sent.size) for message in valid)
        model, memory = self._rule(Turn(self._sent, updates, self.share), self.memory)
        self.memory = {name: np.asarray(vector, np.float32) for name, vector in memory.items()}
        return pack(np.asarray(model - self._sent, np.float32)), None


def _update(message: Message, length: int) -> Update:
    vector = next(iter(message.content.array_records.values()))[TENSOR].numpy()
    if vector.size < length:
        raise ProtocolError(f"an update has {vector.size} values, the model has {length}")
    metrics = next(iter(message.content.metric_records.values()))
    examples, loss = metrics["num-examples"], metrics.get("loss", nan)
    if isinstance(examples, list) or isinstance(loss, list):
        raise ProtocolError("an update's number of examples or loss is not a number")
    return Update(vector[:length], vector[length:], float(examples), float(loss))
