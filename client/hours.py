"""Hours of the week in which a site works for a federation: ``mon-fri 19:00-06:00``, ``sat,sun``, ``22:00-05:30``."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_MIDNIGHT = 24 * 60
_FORM = re.compile(r"(?:(?P<days>[a-z,-]+))?(?:(?:^| )(?P<start>\d{1,2}:\d{2})-(?P<end>\d{1,2}:\d{2}))?")


@dataclass(frozen=True, slots=True)
class Window:
    """From ``start`` (included) to ``end`` (not included), minutes after midnight on the site's clock, on ``days``.

    An ``end`` at or before ``start`` is on the next morning, and belongs to the day on which the window began.
    """

    days: frozenset[int]  # 0 is Monday
    start: int = 0
    end: int = _MIDNIGHT

    @classmethod
    def parse(cls, text: str) -> Window:
        """Read days, hours, or both.

        Raises:
            ValueError: what is wrong with ``text``, and an example of how it should be.

        >>> Window.parse("sat,sun").days == {5, 6}
        True
        """
        form = _FORM.fullmatch(text)
        if not text or form is None:
            raise ValueError(f"write hours as mon-fri 19:00-06:00, or only days, or only hours; got {text!r}")
        days = _days(form["days"]) if form["days"] else frozenset(range(7))
        if form["start"] is None:
            return cls(days)
        start, end = _minutes(form["start"]), _minutes(form["end"])
        if start in (end, _MIDNIGHT):
            raise ValueError(f"{text!r} is no time at all: leave the hours out to mean the whole day")
        return cls(days, start, end)

    def opens(self, local: datetime.datetime) -> bool:
        """Whether ``local``, on the site's clock, lies in this window."""
        minute, today = local.hour * 60 + local.minute, local.weekday()
        if self.start < self.end:
            return today in self.days and self.start <= minute < self.end
        yesterday = (today - 1) % 7
        return (today in self.days and minute >= self.start) or (yesterday in self.days and minute < self.end)


def _days(text: str) -> frozenset[int]:
    days: set[int] = set()
    for part in text.split(","):
        ends = part.split("-")
        if len(ends) > 2 or not set(ends) <= set(DAYS):
            raise ValueError(f"{part!r} is no day: use {', '.join(DAYS)}, or two of them with a hyphen")
        first, last = DAYS.index(ends[0]), DAYS.index(ends[-1])
        days |= {(first + n) % 7 for n in range((last - first) % 7 + 1)}
    return frozenset(days)


def _minutes(text: str) -> int:
    hour, minute = (int(part) for part in text.split(":"))
    if minute > 59 or hour * 60 + minute > _MIDNIGHT:
        raise ValueError(f"{text!r} is no time of day: use 00:00 to 24:00")
    return hour * 60 + minute
