from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfl.client.hours import DAYS, Window


def at(day: str, time: str) -> datetime.datetime:
    hour, minute = map(int, time.split(":"))
    return datetime.datetime(2027, 5, 3 + DAYS.index(day), hour, minute)  # 3 May 2027 is a Monday


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("mon-fri 19:00-23:00", ["mon 19:00", "fri 22:59"], ["mon 18:59", "fri 23:00", "sat 20:00"]),
        ("sat,sun", ["sat 00:00", "sun 23:59"], ["fri 23:59", "mon 00:00"]),
        ("08:00-24:00", ["mon 08:00", "sun 23:59"], ["mon 07:59", "mon 00:00"]),
        ("sun-mon 0:00-6:30", ["sun 00:00", "mon 06:29"], ["mon 06:30", "tue 03:00"]),
        # over midnight: Friday's night ends on Saturday morning, and Sunday's has not begun on Sunday morning
        ("mon-fri 22:00-06:00", ["fri 22:00", "sat 05:59", "tue 03:00"], ["sat 06:00", "mon 05:59", "sun 23:00"]),
        ("sun 22:00-06:00", ["sun 22:00", "mon 05:59"], ["sun 05:59", "mon 22:00"]),
    ],
)
def test_a_window_is_open_from_its_start_until_before_its_end(text: str, inside: list[str], outside: list[str]) -> None:
    window = Window.parse(text)
    assert [window.opens(at(*moment.split())) for moment in inside] == [True] * len(inside)
    assert [window.opens(at(*moment.split())) for moment in outside] == [False] * len(outside)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "write hours as"),
        ("evenings", "is no day"),
        ("mon-wed-fri 10:00-11:00", "is no day"),
        ("mon 10-11", "write hours as"),
        ("mon10:00-11:00", "write hours as"),
        ("25:00-26:00", "is no time of day"),
        ("10:60-11:00", "is no time of day"),
        ("24:00-02:00", "is no time at all"),
        ("10:00-10:00", "leave the hours out"),
    ],
)
def test_what_is_no_window_is_refused_with_the_way_to_write_it(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Window.parse(text)


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 7 * 1440 - 1))
def test_a_window_and_its_complement_share_the_day(start: int, end: int, minute: int) -> None:
    def clock(minutes: int) -> str:
        return f"{minutes // 60:02}:{minutes % 60:02}"

    if start == end:
        return
    moment = datetime.datetime(2027, 5, 3) + datetime.timedelta(minutes=minute)
    one, other = (Window.parse(f"{clock(a)}-{clock(b)}") for a, b in ((start, end), (end, start)))
    assert one.opens(moment) is not other.opens(moment)


@given(st.text(alphabet="monfrisat,- 0123456789:", max_size=30))
def test_any_text_is_a_window_or_a_value_error(text: str) -> None:
    try:
        window = Window.parse(text)
    except ValueError:
        return
    assert window.days <= set(range(7))
    assert 0 <= window.start < 1440
    assert 0 <= window.end <= 1440
