"""The sample is fair, repeatable and of fixed size; the counter of different hashes is exact, then close."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.sampling import DistinctCounter, LinePlace, LineSample


def offer(sample: LineSample, count: int) -> LineSample:
    for number in range(1, count + 1):
        sample.offer(LinePlace(number, number * 100, number % 97))
    return sample


@given(st.integers(0, 300), st.integers(1, 50))
def test_a_sample_holds_different_lines_and_no_more_than_asked_for(count: int, size: int) -> None:
    sample = offer(LineSample(size, 0, "seed"), count)
    numbers = [place.number for place in sample.drawn()]
    assert len(numbers) == len(set(numbers)) == min(size, count)
    assert sample.offered == count
    assert all(1 <= number <= count for number in numbers)


def test_the_seed_decides_the_sample() -> None:
    first, again, other = (offer(LineSample(20, 0, seed), 1000).drawn() for seed in ("a", "a", "b"))
    assert first == again
    assert set(first) != set(other)


def test_every_part_of_the_file_has_its_share() -> None:
    numbers = [place.number for seed in range(40) for place in offer(LineSample(50, 0, str(seed)), 1000).drawn()]
    tenths = [sum(1 for number in numbers if (number - 1) // 100 == tenth) for tenth in range(10)]
    assert len(numbers) == 2000
    assert all(140 < share < 260 for share in tenths), tenths  # 200 each; five standard deviations are 67


def test_the_longest_lines_are_kept_longest_first() -> None:
    longest = offer(LineSample(5, 4, "seed"), 300).longest()
    assert [place.length for place in longest] == [96, 96, 96, 95]
    assert [place.number for place in longest[:3]] == [96, 193, 290]


def hashed(number: int) -> int:
    return int.from_bytes(hashlib.blake2b(str(number).encode(), digest_size=8).digest(), "little")


@given(st.lists(st.integers(0, 2**64 - 1), max_size=200))
def test_few_hashes_are_counted_exactly(values: list[int]) -> None:
    counter = DistinctCounter(most=200)
    for value in values:
        counter.add(value)
    assert (counter.count, counter.is_exact) == (len(set(values)), True)


def test_many_hashes_are_counted_within_a_few_percent_in_fixed_memory() -> None:
    counter = DistinctCounter(most=1024)
    for number in range(100_000):
        counter.add(hashed(number % 50_000))
    assert not counter.is_exact
    assert abs(counter.count - 50_000) < 10_000  # the standard error at this size is 1500
    assert len(counter._kept) <= 1024


def test_equal_hashes_do_not_loop() -> None:
    counter = DistinctCounter(most=1)
    for value in (0, 1 << 63, 0, 1):
        counter.add(value)
    assert len(counter._kept) <= 1
