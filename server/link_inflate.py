"""A reply from the pieces it came in, holding its arrays once: each piece is let go of as soon as it is copied.

One of the four ``server/link*.py`` files, the only ones of the server that touch Flower's private modules. Flower's own
function holds an array four times while it puts it together, which is what a coordinator of large models runs out of.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import cast

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Array, Message
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_object_head_values_from_object_content
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents


def inflate(message_id: str, contents: dict[str, bytes]) -> Message | None:
    """The message of ``message_id``, or None where that is something else.

    ``contents`` has it and all that it is made of, by their ids, and is used up.

    Raises:
        Exception: whatever Flower's parsers make of a stranger's bytes.
    """
    heads = {name: get_object_head_values_from_object_content(content) for name, content in contents.items()}
    arrays = {name: head[1] for name, head in heads.items() if head[0] == Array.__qualname__}
    needed = Counter(piece for pieces in arrays.values() for piece in set(pieces))
    stand_ins: dict[str, InflatableObject] = {}
    data: dict[bytes, bytearray] = {}
    for name, pieces in arrays.items():
        said = json.loads(_body(contents.pop(name)).tobytes())
        # Flower copies its arrays once more, unless they are so small; their data are put in at the end.
        stand_ins[name] = Array(said["dtype"], tuple(said["shape"]), said["stype"], name.encode())
        data[name.encode()] = _joined([pieces[index] for index in said["arraychunk_ids"]], contents, needed)
    message = inflate_object_from_contents(message_id, contents, objects=stand_ins)
    if not isinstance(message, Message):
        return None
    if message.has_content():
        for record in message.content.array_records.values():
            for array in record.values():
                array.data = cast(bytes, data[array.data])  # reads like bytes
    return message


def _joined(order: list[str], contents: dict[str, bytes], needed: Counter[str]) -> bytearray:
    """Copy the pieces one by one; those that no other array needs are dropped from ``contents``."""
    left = Counter(order)
    joined = bytearray(sum(len(_body(contents[piece])) for piece in order))
    end = 0
    for piece in order:
        body = _body(contents[piece])
        joined[end : end + len(body)] = body
        end += len(body)
        left[piece] -= 1
        needed[piece] -= not left[piece]
        if not needed[piece]:
            del body, contents[piece]
    return joined


def _body(content: bytes) -> memoryview:
    return memoryview(content)[content.index(HEAD_BODY_DIVIDER) + 1 :]
