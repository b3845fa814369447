"""Records are those that Flower makes, to the bytes on the wire, and refuse what Flower refuses."""

from __future__ import annotations

from typing import Any

import pytest

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from medfl.shared.flower_records import record_of

VALUES: dict[type[Any], dict[str, Any]] = {
    ArrayRecord: {"float32": Array(np.arange(3, dtype="f4")), "other": Array(np.arange(2))},
    ConfigRecord: {"a": "text", "b": 3, "c": 2.5, "d": b"bytes", "e": True},
    MetricRecord: {"loss": 2.5, "examples": 32, "of numpy": np.float64(1.5)},
    RecordDict: {
        "config": ConfigRecord({"a": 1}),
        "tally": MetricRecord({"loss": 0.5}),
        "arrays": ArrayRecord([np.ones(2)]),
    },
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_record_is_what_flower_makes_of_the_same_values(kind: type[Any]) -> None:
    mine, flowers = record_of(kind, VALUES[kind]), kind(VALUES[kind])
    assert mine == flowers
    assert mine.__dict__.keys() >= {"_check_key_fn", "_check_value_fn", "_data"}
    assert mine.deflate() == flowers.deflate()
    assert mine.object_id == flowers.object_id
    assert list(mine) == list(flowers)


@pytest.mark.parametrize("kind", VALUES)
def test_it_can_be_changed_afterwards_and_leaves_what_it_was_made_of_alone(kind: type[Any]) -> None:
    values = dict(VALUES[kind])
    record = record_of(kind, values)
    before = record.object_id
    key = next(iter(values))
    record["new"] = record[key]
    del record[key]
    assert record.object_id != before
    assert values == VALUES[kind]


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("wrong", [{"key": object()}, {"key": None}, {3: "value"}], ids=["type", "nothing", "key"])
def test_what_flower_refuses_is_refused(kind: type[Any], wrong: dict[Any, Any]) -> None:
    if 3 in wrong:
        wrong = {3: next(iter(VALUES[kind].values()))}
    for make in (lambda: kind(wrong), lambda: record_of(kind, wrong)):
        with pytest.raises(TypeError):
            make()
