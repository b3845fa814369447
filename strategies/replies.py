"""Updates as replies in the form that Flower's strategies aggregate."""

from __future__ import annotations

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Message, MetricRecord, RecordDict

from medfl.shared.messages import Kind, pack
from medfl.shared.weights import Flat


def as_reply(vector: Flat, examples: float, *, loss: float | None = None) -> Message:
    """``vector`` (weights or an update, as the strategy takes them), and how many examples it stands for.

    ``loss`` is the mean training loss of a single site, where it is known.
    """
    metrics = MetricRecord({"num-examples": examples})
    if loss is not None:
        metrics["loss"] = loss
    content = RecordDict({"arrays": pack(vector), "metrics": metrics})
    return Message(content, dst_node_id=0, message_type=Kind.TRAIN.value)
