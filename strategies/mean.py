"""FedAvg: the mean of weights, weighted by examples (McMahan et al. 2017, https://arxiv.org/abs/1602.05629)."""

from __future__ import annotations

from collections.abc import Iterable

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg


class Mean(FedAvg):
    """Flower's FedAvg. The one virtual reply of a round that was summed is the mean already: it is taken as it is."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of ``replies``."""
        messages = list(replies)
        if len(messages) == 1 and messages[0].has_content():
            mean = messages[0].content.get(self.arrayrecord_key)
            if isinstance(mean, ArrayRecord):
                return mean, None
        return super().aggregate_train(server_round, messages)
