"""Everything that sites send under secure aggregation, recorded: no update, no count and no score is in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from tiny import masks_study, site_data

from medfl.client import participant
from medfl.simulations import federation
from medfl.simulations.grid import VirtualGrid

NAMES = ("north", "south", "east", "west")
IMAGES = {"north": 3, "south": 5, "east": 7, "west": 11}  # patients, with two images each: weights 6, 10, 14, 22


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """Contents of all replies, and what the sites held for their sums, of a run of two rounds."""
    replies: list[Any] = []
    held: list[Any] = []

    class Recorder(VirtualGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
            for reply in super().pull_messages(message_ids):
                replies.append(reply.content)
                yield reply

    class Keeper(participant.SecureSite):
        def hold(self, contribution: Any) -> None:
            held.append(contribution)
            super().hold(contribution)

    monkeypatch.setattr(federation, "VirtualGrid", Recorder)
    monkeypatch.setattr(federation, "SecureSite", Keeper)
    study = masks_study(
        secure_aggregation={"mode": "msa1"}, rounds={"count": 2, "minimum_sites": 4}, training={"batch_size": 64}
    )
    sites = {name: site_data(study, seed=number, patients=IMAGES[name]) for number, name in enumerate(NAMES)}
    result = federation.federate(study, sites)
    assert result.result.round == 2
    return replies, held


def test_replies_hold_masked_integers_and_nothing_else(recorded: tuple[list[Any], list[Any]]) -> None:
    replies, _ = recorded
    words = {"outcome", "nonce", "protocol", "control"}
    assert {key for content in replies for key in content["config"]} == words
    assert {content["config"]["outcome"] for content in replies} == {"accepted", "ready", "phase"}
    others = {name for content in replies for name in content} - {"config"}
    assert others == {"masked"}
    arrays = [content["masked"] for content in replies if "masked" in content]
    # four sites: one sum of weights, two of updates, two of scores
    assert len(arrays) == 4 * (1 + 2 + 2)
    assert {(record["vector"].numpy().dtype.str, record["scalars"].numpy().dtype.str) for record in arrays} == {
        ("<u4", "<u8")
    }


def test_no_update_count_or_score_can_be_found_in_what_was_sent(recorded: tuple[list[Any], list[Any]]) -> None:
    replies, held = recorded
    sent = b"".join(
        array.data for content in replies if "masked" in content for array in content["masked"].values()
    ) + b"".join(content["config"].get("control", b"") for content in replies)
    masked = {tuple(c["masked"]["scalars"].numpy().tolist()) for c in replies if "masked" in c}
    assert len(held) == 4 * (1 + 2 + 2)
    assert {contribution.weight for contribution in held} >= {6, 10, 14, 22}
    for contribution in held:
        encoded = contribution.encode()
        assert tuple(encoded.scalars.tolist()) not in masked
        for number in encoded.scalars:
            if number:
                assert number.tobytes() not in sent, "a number crossed unmasked"
        for piece in pieces(contribution.vector.tobytes()) + pieces(encoded.vector.tobytes()):
            assert piece not in sent, "a part of an update crossed unmasked"


def test_the_search_would_find_what_is_there() -> None:
    vector = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    assert any(piece in b"head" + vector.tobytes() + b"tail" for piece in pieces(vector.tobytes()))


def pieces(data: bytes) -> list[bytes]:
    """Sixteen-byte pieces with at least eight different bytes: long enough to be no coincidence."""
    cut = [data[start : start + 16] for start in range(0, len(data) - 15, 16)]
    return [piece for piece in cut if len(set(piece)) >= 8]
