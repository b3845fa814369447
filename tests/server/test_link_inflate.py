"""Replies put together from their pieces: the same as Flower's own function makes, with each array held once."""

from __future__ import annotations

import tracemalloc

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from medfl.server.link_inflate import inflate

MIB = 1 << 20


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def pieces_of(content: InflatableObject) -> dict[str, bytes]:
    return {name: part.deflate() for name, part in get_all_nested_objects(content).items()}


def message(**arrays: np.ndarray) -> Message:
    made = {name: Array(values) for name, values in arrays.items()}
    content = RecordDict({"arrays": ArrayRecord(made), "config": ConfigRecord({"x": 1})})
    return Message(content, 7, "query", ttl=5.0)


@pytest.mark.parametrize(
    "arrays",
    [
        {"small": np.arange(5.0)},
        {"empty": np.empty(0, np.float32)},
        {"long": np.arange(3_000_000, dtype=np.uint32)},  # 12 MB: three pieces
        {"zeros": np.zeros(5_000_000, np.float32)},  # 20 MB, and its pieces between the first and the last are one
        {"one": np.zeros(5_000_000, np.float32), "two": np.zeros(5_000_000, np.float32), "three": np.ones(3)},
        {"matrix": np.arange(6, dtype=np.int64).reshape(2, 3)},
    ],
)
def test_it_is_what_flower_makes_of_the_same_pieces(arrays: dict[str, np.ndarray]) -> None:
    sent = message(**arrays)
    theirs = inflate_object_from_contents(sent.object_id, pieces_of(sent))
    ours = inflate(sent.object_id, pieces_of(sent))
    assert isinstance(theirs, Message)
    assert ours is not None
    assert ours.metadata.dst_node_id == theirs.metadata.dst_node_id == 7
    assert ours.content["config"] == theirs.content["config"]
    for name, values in arrays.items():
        array, flowers = ours.content["arrays"][name], theirs.content["arrays"][name]
        np.testing.assert_array_equal(array.numpy(), values)
        assert array.data == flowers.data
        assert (array.dtype, array.shape, array.stype) == (flowers.dtype, flowers.shape, flowers.stype)


def test_the_pieces_are_let_go_while_the_array_is_put_together() -> None:
    sent = message(vector=np.random.default_rng(0).integers(0, 1 << 32, 10 * MIB, np.uint32))  # 40 MiB in 8 pieces
    name, pieces = sent.object_id, pieces_of(sent)
    del sent
    tracemalloc.start()
    kept = inflate(name, pieces)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept is not None
    assert not pieces
    assert most < 48 * MIB  # beside the pieces that were there: the array once, and one piece


def test_anything_else_than_a_message_is_none() -> None:
    content = message(small=np.arange(5.0)).content
    assert inflate(content.object_id, pieces_of(content)) is None


def test_an_array_that_names_other_pieces_than_it_has_is_refused() -> None:
    sent = message(small=np.arange(5.0))
    pieces = pieces_of(sent)
    (array,) = [name for name, part in pieces.items() if part.startswith(b"Array ")]
    pieces[array] = pieces[array].replace(b'"arraychunk_ids": [0]', b'"arraychunk_ids": [1]')
    with pytest.raises(IndexError):
        inflate(sent.object_id, pieces)
