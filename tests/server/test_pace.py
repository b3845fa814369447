from __future__ import annotations

from medfl.server.pace import Pace


def test_a_site_that_is_not_known_yet_may_take_the_whole_deadline() -> None:
    assert Pace(600).allows("training", 1) == 600


def test_a_site_may_take_five_times_its_longest_and_no_less_than_half_a_minute() -> None:
    pace = Pace(600)
    for seconds in (20.0, 30.0, 10.0):
        pace.took("training", 1, seconds)
    pace.took("evaluate", 1, 0.2)
    assert pace.allows("training", 1) == 150
    assert pace.allows("evaluate", 1) == 30
    assert pace.allows("training", 2) == 600


def test_nobody_may_ever_take_longer_than_the_deadline() -> None:
    pace = Pace(40)
    pace.took("training", 1, 39.0)
    assert pace.allows("training", 1) == 40
    assert Pace(0.5).allows("training", 1) == 0.5


def test_what_was_long_ago_is_forgotten() -> None:
    pace = Pace(3600)
    for seconds in (100.0, 10.0, 10.0, 10.0, 10.0, 10.0):
        pace.took("training", 1, seconds)
    assert pace.allows("training", 1) == 50


def test_a_site_that_was_late_may_take_longer_the_next_time() -> None:
    pace = Pace(3600)
    pace.took("training", 1, 10.0)
    pace.missed("training", 1)
    assert pace.allows("training", 1) == 5 * 50
