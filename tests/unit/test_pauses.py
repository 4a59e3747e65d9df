"""Which pause stops a batch, how long a breaker stays open, and in which hours requests are sent."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.dispatch_hours import are_open, next_opening, parse_hours
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.pauses import (
    ALL,
    Pause,
    PauseCause,
    back_off,
    configuration_mark,
    find_pause,
    model_scope,
    trip,
)

NOW = 1_700_000_000
EVERYTHING = Pause(ALL, PauseCause.OPERATOR, "moving", NOW)
HOURS = st.integers(0, 23)
STEPS = st.integers(0, 7 * 24 * 60 - 1)


@pytest.mark.parametrize(
    ("scope", "stopped"),
    [(ALL, True), ("batch_1", True), ("batch_2", False), (model_scope("tiny"), True), (model_scope("big"), False)],
)
def test_a_pause_stops_what_is_in_its_scope(scope: str, stopped: bool) -> None:
    pause = Pause(scope, PauseCause.ENGINE, "why", NOW)
    assert find_pause([pause], "batch_1", "tiny", NOW) == (pause if stopped else None)


def test_a_batch_without_a_known_model_waits_for_none() -> None:
    assert find_pause([Pause(model_scope("tiny"), PauseCause.ENGINE, "why", NOW)], "batch_1", None, NOW) is None


def test_a_pause_is_over_at_its_end() -> None:
    pause = Pause(ALL, PauseCause.GPU, "hot", NOW, NOW + 60)
    assert find_pause([pause], "batch_1", "tiny", NOW + 59) == pause
    assert find_pause([pause], "batch_1", "tiny", NOW + 60) is None


def test_of_several_the_one_that_ends_last_is_told() -> None:
    short = Pause(ALL, PauseCause.SCHEDULE, "noon", NOW, NOW + 60)
    long = Pause("batch_1", PauseCause.STORAGE, "full", NOW, NOW + 600)
    assert find_pause([short, long], "batch_1", None, NOW) == long
    assert find_pause([short, long, EVERYTHING], "batch_1", None, NOW) == EVERYTHING


def test_what_a_pause_says() -> None:
    assert EVERYTHING.describe() == "paused by operator: moving"
    ending = Pause(ALL, PauseCause.GPU, "hot", NOW, NOW + 60)
    assert ending.describe() == "paused by gpu: hot (until 2023-11-14T22:14:20Z)"


@given(st.integers(1, 200))
def test_a_breaker_stays_open_longer_each_time(strikes: int) -> None:
    assert 30 <= back_off(strikes) <= back_off(strikes + 1) <= 600


def test_a_breaker_counts_from_what_it_left() -> None:
    first = trip(None, ALL, PauseCause.ENGINE, "no", NOW)
    second = trip(first, ALL, PauseCause.ENGINE, "still no", NOW + 40)
    assert (first.until, first.strikes) == (NOW + 30, 1)
    assert (second.until, second.strikes, second.since, second.reason) == (NOW + 100, 2, NOW, "still no")


def test_what_no_repetition_mends_has_no_end_and_knows_its_configuration() -> None:
    mark = configuration_mark(Model("tiny", "somewhere"), "settings")
    pause = trip(None, ALL, PauseCause.ENGINE, "no such model", NOW, lasting=True, mark=mark)
    assert (pause.until, pause.mark) == (None, mark)
    assert trip(None, ALL, PauseCause.ENGINE, "busy", NOW, mark=mark).mark == ""


@pytest.mark.parametrize(
    ("model", "engine"), [(Model("tiny", "elsewhere"), "a"), (Model("tiny", "here"), "b"), (None, "a")]
)
def test_the_mark_changes_with_the_model_and_with_the_settings(model: Model | None, engine: str) -> None:
    assert configuration_mark(model, engine) != configuration_mark(Model("tiny", "here"), "a")


def at(day: int, hour: int, minute: int = 0) -> datetime:
    """Day 0 is a Monday."""
    return datetime(2026, 11, 23 + day, hour, minute, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "local", "is_open"),
    [
        ("", at(0, 12), True),
        ("22:00-06:00", at(0, 21, 59), False),
        ("22:00-06:00", at(0, 22), True),
        ("22:00-06:00", at(1, 5, 59), True),
        ("22:00-06:00", at(1, 6), False),
        ("08:00-09:00, 12:00-13:00", at(0, 12, 30), True),
        ("08:00-09:00, 12:00-13:00", at(0, 9, 30), False),
        ("mon-fri 20:00-07:00", at(5, 6, 59), True),
        ("mon-fri 20:00-07:00", at(5, 20), False),
        ("mon-fri 20:00-07:00", at(0, 6), False),
        ("Sat-Sun 00:00-24:00", at(6, 23, 59), True),
        ("Sat-Sun 00:00-24:00", at(0, 0), False),
        ("fri-mon 10:00-11:00", at(6, 10), True),
        ("wed 10:00-11:00", at(3, 10), False),
    ],
)
def test_hours(text: str, local: datetime, is_open: bool) -> None:
    assert are_open(parse_hours(text), local) is is_open


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("22-6", "is no range of hours"),
        ("25:00-06:00", "25:00 in .* is no time of day"),
        ("10:60-11:00", "10:60"),
        ("10:00-10:00", "has no hour in it"),
        ("foo 10:00-11:00", "'foo' in .* is no day: mon, tue"),
        ("10:00-11:00,", "'' is no range"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_hours(text)


@given(HOURS, HOURS, STEPS, st.sampled_from(["", "mon ", "tue-thu ", "sat-mon "]))
def test_the_next_opening_is_the_first_open_minute(start: int, length: int, minutes: int, days: str) -> None:
    end = (start + length) % 24
    hours = parse_hours(f"{days}{start:02d}:00-{end:02d}:00") if end != start else parse_hours(f"{days}00:00-24:00")
    local = datetime(2026, 11, 23, tzinfo=timezone(timedelta(hours=2))) + timedelta(minutes=minutes)
    if not are_open(hours, local):
        opening = next_opening(hours, local)
        assert opening > local
        assert are_open(hours, opening)
        assert not are_open(hours, opening - timedelta(minutes=1))
        middle = local + (opening - local) / 2
        assert not are_open(hours, middle)
