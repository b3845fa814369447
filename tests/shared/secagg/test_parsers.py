"""Every parser, 100,000 spoilt messages in all: a ProtocolError, or exactly the bytes it was given."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import pytest

from medfl.shared.errors import ProtocolError
from medfl.shared.secagg.announcement import Announcement, Purpose
from medfl.shared.secagg.encoding import Encoding, Segment
from medfl.shared.secagg.messages import (
    Advert,
    Confirmation,
    ConfirmationList,
    KeyList,
    MaskedHeader,
    Reveal,
    SealedShares,
    ShareDelivery,
    SurvivorList,
)
from medfl.shared.secagg.rings import Ring

INPUTS = 100_000
CONTEXT, KEY, SIGNATURE = b"c" * 32, b"k" * 32, b"s" * 64
ADVERTS = tuple(Advert(site, KEY, KEY, SIGNATURE) for site in (1, 2, 300))
VALID = (
    Announcement(CONTEXT, Purpose.TRAIN, 7, 2, (1, 2, 300), 3, Ring.BITS_32, 99, KEY, KEY, KEY),
    Encoding(Ring.BITS_20, (Segment(5, 1.0), Segment(6, 2.0)), 100, ("loss", "dice")),
    ADVERTS[0],
    KeyList(CONTEXT, ADVERTS),
    SealedShares(1, KEY, ((2, bytes(82)), (300, bytes(82))), SIGNATURE),
    ShareDelivery(CONTEXT, ((2, bytes(82)), (300, bytes(82)))),
    MaskedHeader(1, (1, 2, 300), SIGNATURE),
    SurvivorList(CONTEXT, (1, 2, 300)),
    Confirmation(2, SIGNATURE),
    ConfirmationList(CONTEXT, (Confirmation(1, SIGNATURE), Confirmation(2, SIGNATURE))),
    Reveal(1, ((1, bytes(33)), (2, bytes(33))), SIGNATURE),
)


class Message(Protocol):
    def to_bytes(self) -> bytes: ...


def name(message: Message) -> str:
    return type(message).__name__


def spoilt(good: bytes, count: int) -> Iterator[bytes]:
    """Flipped, overwritten, cut, doubled and inserted bytes, and pure noise."""
    rng = np.random.default_rng(len(good))
    kinds, places, values = rng.integers(0, 7, count), rng.random(count), rng.integers(0, 256, (count, 4), np.uint8)
    for kind, place, value in zip(kinds.tolist(), places.tolist(), values, strict=True):
        at, noise = int(place * len(good)), value.tobytes()
        match kind:
            case 0:
                yield good[:at] + bytes([good[at] ^ (1 << noise[0] % 8)]) + good[at + 1 :]
            case 1:
                yield good[:at] + noise + good[at + 4 :]
            case 2:
                yield good[:at]
            case 3:
                yield good + noise[: 1 + noise[0] % 4]
            case 4:
                yield good[:at] + noise[: 1 + noise[0] % 4] + good[at:]
            case 5:
                yield good[:at] + good[at // 2 :]
            case _:
                yield noise * (at // 4)


@pytest.mark.parametrize("message", VALID, ids=name)
def test_a_valid_message_is_read_back(message: Message) -> None:
    assert type(message).parse(message.to_bytes()) == message


@pytest.mark.parametrize("message", VALID, ids=name)
def test_whatever_is_accepted_is_written_back_as_the_same_bytes(message: Message) -> None:
    parse, accepted = type(message).parse, 0
    count = -(-INPUTS // len(VALID))
    for data in spoilt(message.to_bytes(), count):
        try:
            read = parse(data)
        except ProtocolError:
            continue
        accepted += 1
        assert read.to_bytes() == data
    assert 0 < accepted < 0.6 * count  # keys and signatures may hold anything; sizes, ids and order may not


@pytest.mark.parametrize("ids", [(0, 1, 2), (1, 2, 65535), (2, 1, 3), (1, 1, 2)])
def test_ids_that_are_impossible_repeated_or_out_of_order_are_refused(ids: tuple[int, ...]) -> None:
    for bad in (
        SurvivorList(CONTEXT, ids),
        KeyList(CONTEXT, tuple(Advert(site, KEY, KEY, SIGNATURE) for site in ids)),
        SealedShares(1, KEY, tuple((site, bytes(82)) for site in ids), SIGNATURE),
        ShareDelivery(CONTEXT, tuple((site, bytes(82)) for site in ids)),
        MaskedHeader(1, ids, SIGNATURE),
        ConfirmationList(CONTEXT, tuple(Confirmation(site, SIGNATURE) for site in ids)),
        Reveal(1, tuple((site, bytes(33)) for site in ids), SIGNATURE),
        Announcement(CONTEXT, Purpose.TRAIN, 7, 2, ids, 3, Ring.BITS_32, 99, KEY, KEY, KEY),
    ):
        with pytest.raises(ProtocolError, match="twice or out of order"):
            type(bad).parse(bad.to_bytes())


def test_more_than_128_sites_are_refused_before_they_are_read() -> None:
    for parser, size_at in (
        *((KeyList, 32), (ShareDelivery, 32), (SurvivorList, 32), (ConfirmationList, 32)),
        (Announcement, 32 + 1 + 4 + 4),  # study, purpose, round, attempt
    ):
        with pytest.raises(ProtocolError, match="too many sites"):
            parser.parse(bytes(size_at) + (129).to_bytes(2, "little"))
    with pytest.raises(ProtocolError, match="wrong size"):
        MaskedHeader.parse(bytes(2 + 2 * 129 + 64))
    with pytest.raises(ProtocolError, match="wrong size"):
        Reveal.parse(bytes(2 + 35 * 129 + 64))


def test_all_of_a_sites_messages_among_64_sites_have_less_than_30_kilobytes() -> None:
    everybody = tuple(range(1, 65))
    others = everybody[1:]
    adverts = tuple(Advert(site, KEY, KEY, SIGNATURE) for site in everybody)
    confirmations = tuple(Confirmation(site, SIGNATURE) for site in everybody)
    sent = (
        adverts[0],
        SealedShares(1, KEY, tuple((site, bytes(82)) for site in others), SIGNATURE),
        MaskedHeader(1, everybody, SIGNATURE),
        confirmations[0],
        Reveal(1, tuple((site, bytes(33)) for site in everybody), SIGNATURE),
    )
    received = (
        Announcement(CONTEXT, Purpose.TRAIN, 7, 2, everybody, 43, Ring.BITS_32, 99, KEY, KEY, KEY),
        KeyList(CONTEXT, adverts),
        ShareDelivery(CONTEXT, tuple((site, bytes(82)) for site in others)),
        SurvivorList(CONTEXT, everybody),
        ConfirmationList(CONTEXT, confirmations),
    )
    sizes = [len(message.to_bytes()) for message in (*sent, *received)]
    # 130, 98 + 84 * 63, 66 + 2 * 64, 66, 66 + 35 * 64; received 152 + 2 * 64, 34 + 130 * 64, 34 + 84 * 63, and so on
    assert sizes == [130, 5390, 194, 66, 2306, 314, 8354, 5326, 162, 4258]
    assert sum(sizes) < 30_000
