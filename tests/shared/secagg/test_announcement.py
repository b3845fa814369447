"""The announcement and its context hash: known answers, and nothing left out."""

from dataclasses import replace

import pytest

from medfl.shared.secagg.announcement import Announcement, Purpose
from medfl.shared.secagg.hashing import derive_key, tagged_hash
from medfl.shared.secagg.limits import default_minimum_cohort, threshold_of
from medfl.shared.secagg.rings import Ring

ANNOUNCEMENT = Announcement(
    study=b"\1" * 32,
    purpose=Purpose.TRAIN,
    round=7,
    attempt=2,
    cohort=(1, 2, 300),
    threshold=3,
    ring=Ring.BITS_32,
    length=1_000_000,
    encoding=b"\2" * 32,
    model=b"\3" * 32,
    roster=b"\4" * 32,
    training=5,
    sent=b"\5" * 32,
)


def test_the_context_of_a_known_announcement_is_known() -> None:
    assert ANNOUNCEMENT.context().hex() == "2c6b9e37682e754327c50ce9691538fe91360b50a9fa3a3ad3d7e9197a262220"


def test_the_hash_and_the_derived_key_of_known_inputs_are_known() -> None:
    assert tagged_hash(b"tag", b"ab", b"c").hex()[:16] == "ec38c7c73e85a271"
    assert derive_key(bytes(32), context=b"\1" * 32, purpose=b"self").hex()[:16] == "2f64a1c00858a41c"


def test_parts_do_not_run_into_each_other() -> None:
    assert len({tagged_hash(b"t", *parts) for parts in ((b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""))}) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"study": bytes(32)},
        {"purpose": Purpose.EVALUATE},
        {"round": 8},
        {"attempt": 3},
        {"cohort": (1, 2, 301)},
        {"threshold": 2},
        {"ring": Ring.BITS_16},
        {"length": 999_999},
        {"encoding": bytes(32)},
        {"model": bytes(32)},
        {"roster": bytes(32)},
        {"training": 6},
        {"sent": bytes(32)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_is_in_the_context(change: dict[str, object]) -> None:
    assert replace(ANNOUNCEMENT, **change).context() != ANNOUNCEMENT.context()


def test_thresholds_and_minimum_cohorts_are_those_of_the_table() -> None:
    drop_outs = {3: 0, 4: 1, 7: 2, 10: 3, 16: 5, 100: 33}
    assert {n: n - threshold_of(n) for n in drop_outs} == drop_outs
    assert [default_minimum_cohort(n) for n in (3, 4, 5, 8, 9, 100)] == [3, 3, 4, 4, 5, 50]


def test_two_survivor_sets_need_a_third_of_the_sites_to_sign_both() -> None:
    for n in range(3, 129):
        assert 2 * threshold_of(n) - n > n / 3
