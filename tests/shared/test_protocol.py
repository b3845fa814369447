"""Messages of the protocol before, stored as they crossed: answers of older sites are read, requests written alike.

``protocol_1.json`` holds Flower's serialisation of one message of every kind, written by the last release that spoke
protocol 1. When PROTOCOL rises, store the set of the release before it in the same way and test against that.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from medfl.shared.chain import Head
from medfl.shared.errors import Code, ProtocolError
from medfl.shared.messages import (
    PROTOCOL,
    EvaluateReply,
    Failure,
    HeadsReply,
    HeadsRequest,
    Log,
    ModelRequest,
    OfferAccepted,
    Ready,
    SecureReply,
    SecureRequest,
    StudyOffer,
    TrainReply,
    WeightRequest,
    protocol_of,
    written_as,
)
from medfl.shared.secagg.exchange import Phase
from medfl.shared.study import Study

STORED = {
    name: base64.b64decode(text)
    for name, text in json.loads(Path(__file__).with_name("protocol_1.json").read_text("utf-8")).items()
}
VECTOR = np.array([1.5, -2.25, 0.0], np.float32)
TALLY = {"loss": 1.5, "examples": 3.0}
DIGEST = "9414b256a10346b1fb102c3f230b4e83c8374a88f1b0c7c655f5f45c2d04483c"


def stored(name: str) -> RecordDict:
    return recorddict_from_proto(RecordDictProto.FromString(STORED[name]))


def wire(content: RecordDict) -> bytes:
    return recorddict_to_proto(content).SerializeToString(deterministic=True)


def test_the_stored_set_is_of_the_protocol_before() -> None:
    assert {protocol_of(stored(name)) for name in STORED} == {PROTOCOL - 1}


def test_answers_of_an_older_site_are_read() -> None:
    assert OfferAccepted.parse(stored("accepted")) == OfferAccepted()
    assert OfferAccepted.parse(stored("accepted with patients")) == OfferAccepted(12)
    assert HeadsReply.parse(stored("ledger reply")) == HeadsReply({Log.LEDGER: Head(2, "ab" * 32)})
    assert SecureReply.parse(stored("phase reply")).reply.control == b"control"
    masked = SecureReply.parse(stored("masked input")).reply
    assert masked.vector is not None
    assert masked.scalars is not None
    assert (masked.vector.tolist(), masked.scalars.tolist()) == ([1, 2, 3], [4])
    trained = TrainReply.parse(stored("train reply"))
    assert (trained.update.tolist(), trained.examples, trained.tally) == (VECTOR.tolist(), 7, TALLY)
    assert Ready.parse(stored("ready")) == Ready()
    assert EvaluateReply.parse(stored("evaluate reply")).tally == TALLY
    assert Failure.parse(stored("failure")) == Failure(Code.TRAINING, "loss not finite")


REQUESTS = {
    "model request": ModelRequest(DIGEST, 3, VECTOR, counted=2),
    "model request for a secure sum": ModelRequest(DIGEST, 3, VECTOR, b"encoding", counted=2),
    "weight request": WeightRequest(DIGEST, b"encoding"),
    "ledger request": HeadsRequest(
        DIGEST, 3, {Log.LEDGER: Head(2, "ab" * 32), Log.AUDIT: Head(9, "cd" * 32)}, b"receipt"
    ),
    "phase request": SecureRequest(Phase.SHARE_KEYS, b"control"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_to_an_older_site_are_byte_for_byte_as_its_own_release_wrote_them(name: str) -> None:
    assert wire(written_as(REQUESTS[name].record(), PROTOCOL - 1)) == wire(stored(name))


def test_an_offer_to_an_older_site_holds_the_same_study_under_the_same_digest() -> None:
    canonical = stored("offer")["config"]["canonical"]
    assert isinstance(canonical, bytes)
    study = Study.from_canonical(canonical, digest=DIGEST)
    offer = StudyOffer(study.digest, study.canonical(), bytes(64))
    assert wire(written_as(offer.record(), 1)) == wire(stored("offer"))


def test_an_offer_of_an_older_coordinator_is_not_signed_and_therefore_none() -> None:
    with pytest.raises(ProtocolError, match="no signature"):
        StudyOffer.parse(stored("offer"))


def test_what_a_strategy_adds_reaches_an_older_site_too() -> None:
    request = ModelRequest(DIGEST, 3, VECTOR, counted=2).record()
    request["config"] = ConfigRecord({**request["config"], "proximal-mu": 0.1})
    older = written_as(request, PROTOCOL - 1)
    assert wire(older) == wire(stored("model request with a proximal term"))
    assert protocol_of(request) == PROTOCOL  # the original is as it was: strategies give all sites the same record


def test_nothing_changes_for_a_site_of_this_release() -> None:
    request = ModelRequest(DIGEST, 3, VECTOR, counted=2).record()
    assert written_as(request, PROTOCOL) is request


def test_two_releases_apart_is_told() -> None:
    content = stored("ready")
    content["config"] = ConfigRecord({**content["config"], "protocol": PROTOCOL - 2})
    with pytest.raises(ProtocolError, match="update the older"):
        Ready.parse(content)
