"""Reads DISPATCH_HOURS: the hours in which requests may be sent. Outside of them a pause of cause `schedule` stands.

    hours := range ("," range)*      range := [days] HH:MM-HH:MM      days := day ["-" day]      day := mon .. sun

A range whose end is not after its start goes on past midnight and belongs to the day on which it begins.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MINUTES = 24 * 60
_RANGE = re.compile(r"(?:([a-z]{3})(?:-([a-z]{3}))?\s+)?(\d{1,2}):(\d\d)\s*-\s*(\d{1,2}):(\d\d)")
_EXAMPLE = "write ranges like 22:00-06:00 or mon-fri 20:00-07:00, with commas between"


@dataclass(frozen=True, slots=True)
class HourRange:
    """`start` and `end` in minutes since midnight; `days` on which it begins, 0 is Monday."""

    days: frozenset[int]
    start: int
    end: int

    def includes(self, local: datetime) -> bool:
        today, minute = local.weekday(), local.hour * 60 + local.minute
        if self.start < self.end:
            return today in self.days and self.start <= minute < self.end
        began_yesterday = (today - 1) % 7 in self.days and minute < self.end
        return began_yesterday or (today in self.days and minute >= self.start)


def parse_hours(text: str) -> tuple[HourRange, ...]:
    """Return the ranges of a setting; none for an empty one. Raises ValueError, which says what cannot be read."""
    return tuple(_parse_range(part.strip().lower()) for part in text.split(",")) if text.strip() else ()


def _parse_range(part: str) -> HourRange:
    found = _RANGE.fullmatch(part)
    if found is None:
        raise ValueError(f"{part!r} is no range of hours: {_EXAMPLE}")
    first, last, *numbers = found.groups()
    start, end = _minutes(numbers[0], numbers[1], part), _minutes(numbers[2], numbers[3], part)
    if start in (end, _DAY_MINUTES):
        raise ValueError(f"{part!r} has no hour in it; for a whole day write 00:00-24:00")
    return HourRange(_days(first, last, part), start, end)


def _minutes(hours: str, minutes: str, part: str) -> int:
    total = int(hours) * 60 + int(minutes)
    if int(minutes) > 59 or total > _DAY_MINUTES:
        raise ValueError(f"{hours}:{minutes} in {part!r} is no time of day: 00:00 to 24:00")
    return total


def _days(first: str | None, last: str | None, part: str) -> frozenset[int]:
    for day in (first, last):
        if day is not None and day not in _DAYS:
            raise ValueError(f"{day!r} in {part!r} is no day: {', '.join(_DAYS)}")
    if first is None:
        return frozenset(range(7))
    begin = _DAYS.index(first)
    length = (_DAYS.index(last or first) - begin) % 7 + 1
    return frozenset((begin + step) % 7 for step in range(length))


def are_open(hours: Sequence[HourRange], local: datetime) -> bool:
    """True when requests may be sent at this local time; no range at all means always."""
    return not hours or any(each.includes(local) for each in hours)


def next_opening(hours: Sequence[HourRange], local: datetime) -> datetime:
    """Return the next local time at which a range begins. `hours` is not empty."""
    return min(
        begins
        for each in hours
        for ahead in range(8)
        if (local.weekday() + ahead) % 7 in each.days and (begins := _begin(each, local, ahead)) > local
    )


def _begin(each: HourRange, local: datetime, ahead: int) -> datetime:
    day = local.date() + timedelta(days=ahead)
    return datetime.combine(day, time(each.start // 60, each.start % 60), local.tzinfo)
