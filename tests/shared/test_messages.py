from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.supercore.task_identity import TaskIdentity

from medfl.shared.chain import Head
from medfl.shared.errors import Code, ProtocolError
from medfl.shared.messages import (
    PROTOCOL,
    TENSOR,
    EvaluateReply,
    Failure,
    HeadsReply,
    HeadsRequest,
    Kind,
    Log,
    ModelRequest,
    OfferAccepted,
    Ready,
    StudyOffer,
    TrainReply,
    outcome,
    request_config,
)

DIGEST = "0123456789abcdef" * 4
VECTOR = np.array([1.5, -2.25, 0.0], np.float32)
TALLY = {"loss": 1.5, "examples": 3.0}

ALL: list[Any] = [
    StudyOffer(DIGEST, b"{}", bytes(64)),
    StudyOffer(DIGEST, b"{}", bytes(64), b"\x00a file"),
    OfferAccepted(),
    OfferAccepted(12),
    ModelRequest(DIGEST, 3, VECTOR),
    TrainReply(VECTOR, 7, TALLY),
    TrainReply(VECTOR, 7),
    Ready(),
    EvaluateReply(TALLY),
    EvaluateReply(),
    HeadsRequest(DIGEST, 3, {Log.AUDIT: Head(7, DIGEST), Log.JOURNAL: Head(0, DIGEST)}, b"signed"),
    HeadsRequest(DIGEST, 1),
    HeadsReply({Log.AUDIT: Head(8, DIGEST), Log.LEDGER: Head(2, DIGEST)}, audit_held=False),
    HeadsReply(),
    Failure(Code.TRAINING, "loss not finite"),
    Failure(Code.UNEXPECTED),
]
REPLIES = [message for message in ALL if not isinstance(message, StudyOffer | ModelRequest | HeadsRequest)]


def fields(message: Any) -> dict[str, Any]:
    values = {name: getattr(message, name) for name in message.__slots__}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def over_the_wire(content: RecordDict) -> RecordDict:
    """Through Flower's own protobuf, byte for byte as between two machines."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(content, dst_node_id=2, message_type=Kind.TRAIN.value)
    return message_from_proto(MessageProto.FromString(message_to_proto(message).SerializeToString())).content


def names(message: Any) -> str:
    return type(message).__name__


@pytest.mark.parametrize("message", ALL, ids=names)
def test_a_message_is_the_same_after_its_records(message: Any) -> None:
    again = type(message).parse(message.record())
    assert fields(again) == fields(message)


@pytest.mark.parametrize("message", ALL, ids=names)
def test_a_message_is_the_same_after_the_wire(message: Any) -> None:
    again = type(message).parse(over_the_wire(message.record()))
    assert fields(again) == fields(message)


def test_weights_cross_the_wire_bit_for_bit() -> None:
    vector = np.array([np.float32(1e-45), -0.0, np.finfo(np.float32).max, 1 / 3], np.float32)
    again = TrainReply.parse(over_the_wire(TrainReply(vector, 1).record())).update
    assert again.tobytes() == vector.tobytes()


@pytest.mark.parametrize("reply", REPLIES, ids=names)
def test_two_identical_replies_differ_by_their_nonce(reply: Any) -> None:
    first, second = reply.record(), reply.record()
    assert first["config"]["nonce"] != second["config"]["nonce"]
    assert first.object_id != second.object_id  # what Flower's object store goes by


@pytest.mark.parametrize(
    ("reply", "word"),
    [
        (OfferAccepted(), "accepted"),
        (TrainReply(VECTOR, 1), "trained"),
        (Ready(), "ready"),
        (EvaluateReply(), "evaluated"),
        (Failure(Code.DATA), "failed"),
    ],
)
def test_the_outcome_tells_what_kind_of_reply_it_is(reply: Any, word: str) -> None:
    assert outcome(reply.record()) == word


def refused(parse: Callable[[RecordDict], Any], content: RecordDict, words: str | None = None) -> None:
    with pytest.raises(ProtocolError, match=words):
        parse(content)


@pytest.mark.parametrize("message", ALL, ids=names)
def test_a_field_that_nobody_knows_is_refused_and_named(message: Any) -> None:
    content = message.record()
    content["config"]["surprise"] = 1
    refused(type(message).parse, content, "unknown fields: surprise")


@pytest.mark.parametrize("message", ALL, ids=names)
def test_a_record_that_nobody_asked_for_is_refused(message: Any) -> None:
    content = message.record()
    content["extra"] = ArrayRecord({"a": Array(VECTOR)})
    refused(type(message).parse, content)


@pytest.mark.parametrize("message", ALL, ids=names)
def test_each_field_is_required_except_the_number_of_patients(message: Any) -> None:
    for key in message.record()["config"]:
        content = message.record()
        del content["config"][key]
        if key != "patients":
            refused(type(message).parse, content, key)


@pytest.mark.parametrize("message", ALL, ids=names)
@pytest.mark.parametrize("value", [1.5, True, b"", "x" * 100, -1, 2**62])
def test_a_field_of_another_kind_is_refused(message: Any, value: Any) -> None:
    for key in message.record()["config"]:
        content = message.record()
        content["config"][key] = value
        if key != "nonce" and not (key in ("canonical", "receipt") and isinstance(value, bytes)):
            refused(type(message).parse, content)


@pytest.mark.parametrize("message", ALL, ids=names)
@pytest.mark.parametrize("version", [PROTOCOL + 1, 99, -1])
def test_a_newer_protocol_is_refused_with_the_way_out(message: Any, version: int) -> None:
    content = message.record()
    content["config"]["protocol"] = version
    refused(type(message).parse, content, "update the older of the two")


def test_one_kind_of_reply_is_not_taken_for_another() -> None:
    for reply in REPLIES:
        for kind in {type(other) for other in REPLIES} - {type(reply)}:
            refused(kind.parse, reply.record())


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "../" * 21 + "a"])
def test_a_study_is_named_by_its_digest_and_nothing_else(digest: str) -> None:
    refused(StudyOffer.parse, StudyOffer(digest, b"{}", bytes(64)).record(), "digest")
    refused(ModelRequest.parse, ModelRequest(digest, 1, VECTOR).record(), "digest")


@pytest.mark.parametrize("number", [0, -1, 2**32])
def test_rounds_are_counted_from_one(number: int) -> None:
    refused(ModelRequest.parse, ModelRequest(DIGEST, number, VECTOR).record(), "round")


@pytest.mark.parametrize("count", [-1, 2**32])
def test_a_count_is_neither_negative_nor_absurd(count: int) -> None:
    refused(TrainReply.parse, TrainReply(VECTOR, count).record(), "examples")
    refused(OfferAccepted.parse, OfferAccepted(count).record(), "patients")


def with_array(array: Array, name: str = TENSOR) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({name: array}), "config": request_config(DIGEST, 1)})


def stored(payload: bytes, stype: str = "numpy.ndarray") -> RecordDict:
    return with_array(Array(dtype="float32", shape=(3,), stype=stype, data=payload))


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", npy(VECTOR))
    return buffer.getvalue()


def huge() -> bytes:
    """A header that claims four terabytes."""
    return npy(VECTOR).replace(b"'shape': (3,)", b"'shape': (1000000000000,)").replace(b" " * 12, b"", 1)


@pytest.mark.parametrize(
    "content",
    [
        with_array(Array(VECTOR.astype(np.float64))),
        with_array(Array(VECTOR.astype(">f4"))),
        with_array(Array(VECTOR.reshape(3, 1))),
        with_array(Array(np.array(1.0, np.float32))),
        with_array(Array(VECTOR.astype(np.int64))),
        with_array(Array(VECTOR), name="other"),
        stored(b""),
        stored(b"nonsense"),
        stored(npy(VECTOR)[:-1]),
        stored(npy(VECTOR)[:20]),
        stored(npy(np.array([{}], object))),
        stored(zipped()),
        stored(zipped()[:30]),
        stored(huge()),
        stored(npy(VECTOR), stype="pickle"),
        stored(npy(VECTOR).replace(b"{'descr'", b"{['desc'")),
        RecordDict({"arrays": MetricRecord({"a": 1}), "config": request_config(DIGEST, 1)}),
        RecordDict({"config": request_config(DIGEST, 1)}),
        RecordDict({"arrays": ArrayRecord(), "config": request_config(DIGEST, 1)}),
        RecordDict({"arrays": ArrayRecord({TENSOR: Array(VECTOR)})}),
        RecordDict({"arrays": ArrayRecord({TENSOR: Array(VECTOR)}), "config": MetricRecord({"a": 1})}),
        RecordDict(),
    ],
)
def test_whatever_is_not_one_flat_float32_tensor_is_refused(content: RecordDict) -> None:
    refused(ModelRequest.parse, content)


def test_a_strategy_may_add_its_proximal_weight() -> None:
    content = ModelRequest(DIGEST, 1, VECTOR).record()
    content["config"]["proximal-mu"] = 0.1
    assert ModelRequest.parse(content).round == 1


@pytest.mark.parametrize(
    "tally",
    [{"loss": float("nan")}, {"loss": float("inf")}, {"loss": [1.0]}, {"x" * 201: 1.0}, {"line\nbreak": 1.0}],
)
def test_a_tally_holds_finite_numbers_under_short_names(tally: dict[str, Any]) -> None:
    for kind, message in ((TrainReply, TrainReply(VECTOR, 1)), (EvaluateReply, EvaluateReply())):
        content = message.record()
        content["tally"] = MetricRecord(tally)
        refused(kind.parse, content, "tally")


def test_the_longest_names_of_classes_still_fit_in_a_tally() -> None:
    name = f"confusion/{'a' * 64}/{'b' * 64}"
    assert EvaluateReply.parse(EvaluateReply({name: 1.0}).record()).tally == {name: 1.0}


@pytest.mark.parametrize(
    ("code", "reason"), [("strange", ""), ("data", "x" * 81), ("data", "a\nb"), ("data", "\x1b[2J")]
)
def test_a_failure_is_a_known_code_and_a_short_printable_reason(code: str, reason: str) -> None:
    content = Failure(Code.DATA).record()
    content["config"]["code"], content["config"]["reason"] = code, reason
    refused(Failure.parse, content)


def test_a_long_reason_is_cut_before_it_is_sent() -> None:
    assert Failure.parse(Failure(Code.DATA, "y" * 200).record()).reason == "y" * 80


scalars = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=10), st.binary(max_size=10)
)
keys = st.sampled_from(
    [
        "study",
        "canonical",
        "protocol",
        "server-round",
        "outcome",
        "nonce",
        "examples",
        "patients",
        "code",
        "reason",
        "x",
    ]
)
values = st.one_of(scalars, st.sampled_from([DIGEST, PROTOCOL, "trained", "accepted", "evaluated", "failed", "data"]))
arrays = st.one_of(
    st.builds(Array, st.sampled_from([VECTOR, VECTOR.astype(np.float16), VECTOR.reshape(1, 3)])),
    st.builds(
        lambda data, stype: Array("float32", (3,), stype, data),
        st.one_of(st.binary(max_size=200), st.integers(0, 140).map(lambda n: npy(VECTOR)[:n])),
        st.sampled_from(["numpy.ndarray", ""]),
    ),
)
records = st.one_of(
    st.dictionaries(keys, values, max_size=6).map(ConfigRecord),
    st.dictionaries(st.sampled_from([TENSOR, "x"]), arrays, max_size=2).map(ArrayRecord),
    st.dictionaries(st.text(max_size=5), st.one_of(st.floats(), st.integers(-(2**63), 2**63 - 1)), max_size=3).map(
        MetricRecord
    ),
)
contents = st.dictionaries(st.sampled_from(["config", "arrays", "tally", "x"]), records, max_size=4).map(RecordDict)


@given(contents)
def test_any_records_give_a_message_or_a_protocol_error(content: RecordDict) -> None:
    for kind in (
        StudyOffer,
        OfferAccepted,
        ModelRequest,
        TrainReply,
        Ready,
        EvaluateReply,
        HeadsRequest,
        HeadsReply,
        Failure,
    ):
        with contextlib.suppress(ProtocolError):
            kind.parse(content)  # type: ignore[attr-defined]
    with contextlib.suppress(ProtocolError):
        outcome(content)


@given(st.sampled_from(ALL), st.data())
def test_one_wrong_record_or_field_gives_the_message_or_a_protocol_error(message: Any, data: st.DataObject) -> None:
    content = message.record()
    if data.draw(st.booleans()):
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(records)
    else:
        content["config"][data.draw(keys)] = data.draw(values)
    with contextlib.suppress(ProtocolError):
        type(message).parse(content)


@pytest.mark.parametrize(
    "change",
    [{"audit-head": "x" * 64}, {"audit-head": "ab"}, {"audit-head": None}, {"audit-rows": -1}, {"audit-rows": None}],
    ids=str,
)
def test_half_a_head_or_a_malformed_one_is_refused(change: dict[str, Any]) -> None:
    content = HeadsRequest(DIGEST, 1, {Log.AUDIT: Head(7, DIGEST)}).record()
    for key, value in change.items():
        if value is None:
            del content["config"][key]
        else:
            content["config"][key] = value
    with pytest.raises(ProtocolError):
        HeadsRequest.parse(content)


def test_a_receipt_of_any_length_is_not_taken() -> None:
    with pytest.raises(ProtocolError, match="too long"):
        HeadsRequest.parse(HeadsRequest(DIGEST, 1, receipt=bytes(5000)).record())
