"""The rules of a project's limits: the token bucket, its waiting time, bytes and queued lines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.limits import Bucket, StorageRoom, check_queue, retry_after, take_token

NOW = 1_000_000.0


def take(count: int, bucket: Bucket | None, per_minute: int, now: float) -> tuple[Bucket | None, list[float]]:
    waits = []
    for _ in range(count):
        bucket, wait = take_token(bucket, per_minute, now)
        waits.append(wait)
    return bucket, waits


def test_a_minutes_requests_may_come_at_once_and_no_more() -> None:
    bucket, waits = take(4, None, 3, NOW)
    assert waits == [0.0, 0.0, 0.0, 20.0]
    assert bucket is not None
    assert take_token(bucket, 3, NOW + 19.0)[1] == pytest.approx(1.0)
    assert take_token(bucket, 3, NOW + 20.0)[1] == 0.0


def test_a_refused_request_costs_nothing() -> None:
    bucket, _ = take(3, None, 3, NOW)
    bucket, waits = take(50, bucket, 3, NOW)
    assert set(waits) == {20.0}


def test_a_long_rest_fills_no_more_than_a_minute() -> None:
    bucket, _ = take(3, None, 3, NOW)
    _, waits = take(4, bucket, 3, NOW + 86_400)
    assert waits == [0.0, 0.0, 0.0, 20.0]


def test_a_clock_that_is_set_back_locks_nobody_out() -> None:
    bucket, _ = take(3, None, 3, NOW)
    bucket, waits = take(1, bucket, 3, NOW - 3_600)
    assert waits == [20.0]
    assert take_token(bucket, 3, NOW - 3_580)[1] == 0.0


@given(per_minute=st.integers(1, 10_000), steps=st.lists(st.floats(0, 100), max_size=60))
def test_whoever_waits_as_told_is_served(per_minute: int, steps: list[float]) -> None:
    bucket, now = None, NOW
    for step in steps:
        now += step
        bucket, wait = take_token(bucket, per_minute, now)
        if wait:
            seconds = retry_after(wait)
            assert 1 <= seconds <= 60
            now += seconds
            bucket, wait = take_token(bucket, per_minute, now)
            assert wait == 0.0


@given(per_minute=st.integers(1, 50), steps=st.lists(st.floats(0, 5), max_size=200))
def test_no_more_than_the_burst_and_the_rate_are_served(per_minute: int, steps: list[float]) -> None:
    bucket, now, served = None, NOW, 0
    for step in steps:
        now += step
        bucket, wait = take_token(bucket, per_minute, now)
        served += not wait
    assert served <= per_minute + (now - NOW) * per_minute / 60 + 1e-6


def test_bytes_fit_to_the_last_one() -> None:
    room = StorageRoom("team-a", stored=40, most=100)
    room.check(60)
    with pytest.raises(InvalidInput, match="may store 100 bytes and stores 40") as caught:
        room.check(61)
    assert caught.value.code == "storage_limit_exceeded"


@pytest.mark.parametrize(("queued", "lines", "most"), [(0, 10, 10), (4, 6, 10), (0, 10**9, 0), (10**9, 1, 0)])
def test_a_batch_that_fits_into_the_queue(queued: int, lines: int, most: int) -> None:
    assert check_queue("team-a", queued, lines, most) is None


def test_a_batch_that_does_not_fit_into_the_queue() -> None:
    error = check_queue("team-a", 5, 6, 10)
    assert error is not None
    assert (error.code, error.line, error.param) == ("request_limit_exceeded", None, None)
    assert "Limit: 10 enqueued requests, of which 5 are taken; this batch has 6" in error.message
