"""Flower's records with all their values at once: checked as Flower checks them, without what it spends around that.

Setting one value makes Flower build two type objects anew, 2 microseconds; a reply holds eight values, and a step of a
small model takes 30. The one file that touches Flower's private ``TypedDict._data``; a test compares with its own way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

_HOLDS: dict[type, tuple[type, ...]] = {
    ArrayRecord: (Array,),
    ConfigRecord: (str, int, float, bytes),
    MetricRecord: (int, float),
    RecordDict: (ArrayRecord, ConfigRecord, MetricRecord),
}

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord, RecordDict)


def record_of(kind: type[Record], values: Mapping[str, object]) -> Record:
    """As ``kind(values)``, for values that are no lists.

    Raises:
        TypeError: a record of that kind does not hold such a value.
    """
    holds, record = _HOLDS[kind], kind()
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, holds):
            raise TypeError(f"{kind.__name__} holds no {type(value).__name__} under a {type(key).__name__}")
    record.__dict__["_data"].update(values)
    return record
