"""Borders of the buckets, and the picture."""

import pytest

from vllm_batch_dagster.core.histogram import Histogram, draw_histogram


@pytest.mark.parametrize(
    ("length", "bucket"),
    [(-1, 0), (0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (1024, 1024), (1025, 2048)],
)
def test_a_bucket_holds_lengths_up_to_and_including_its_name(length: int, bucket: int) -> None:
    lengths = Histogram()
    lengths.add(length)
    assert lengths.buckets() == ((bucket, 1),)


def test_buckets_come_smallest_first_and_start_from_others() -> None:
    lengths = Histogram(((16, 2), (0, 1)))
    for length in (9, 1, 300):
        lengths.add(length)
    assert lengths.buckets() == ((0, 1), (1, 1), (16, 3), (512, 1))


def test_a_rare_bucket_is_still_seen() -> None:
    drawn = draw_histogram(((1, 1), (2, 100_000)), width=10).splitlines()
    assert [line.count("█") for line in drawn] == [1, 10]
    assert drawn[0].endswith(" 1")


def test_buckets_without_a_count_draw_nothing() -> None:
    assert draw_histogram(((1, 0), (2, 0))) == ""
