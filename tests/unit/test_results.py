"""The result index and the histogram: what goes in comes out, the first answer of a line wins."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.byteindex import IndexEntry, pack_entry, pack_header, read_count, read_entries
from vllm_batch_dagster.core.errors import StorageFailure
from vllm_batch_dagster.core.histogram import Histogram, draw_histogram
from vllm_batch_dagster.core.results import FAILED, NO_ANSWER, SUCCEEDED, ResultEntry, ResultTable, read_results


def test_first_answer_wins_and_gaps_stay_gaps() -> None:
    table = ResultTable(3)
    first = ResultEntry(1, 18, 40, SUCCEEDED)
    assert table.put(1, first)
    assert not table.put(1, ResultEntry(2, 99, 9, FAILED))
    index = read_results(io.BytesIO(table.pack("batch_expired")))
    assert index.reason == "batch_expired"
    assert list(index.entries) == [NO_ANSWER, first, NO_ANSWER]


@pytest.mark.parametrize("damaged", [b"", b"nonsense" * 10, ResultTable(5).pack("x")[:-1]])
def test_a_damaged_result_index_is_refused(damaged: bytes) -> None:
    with pytest.raises(StorageFailure, match="materialize"):
        read_results(io.BytesIO(damaged))


ENTRIES = st.lists(
    st.builds(IndexEntry, st.integers(0, 2**60), st.integers(0, 2**30), st.integers(0, 2**64 - 1), st.integers(0, 9)),
    max_size=1200,
)


@given(ENTRIES, st.data())
def test_any_part_of_the_byte_index_reads_back(entries: list[IndexEntry], data: st.DataObject) -> None:
    packed = io.BytesIO(pack_header(len(entries)) + b"".join(map(pack_entry, entries)))
    first = data.draw(st.integers(0, len(entries)))
    count = data.draw(st.integers(0, len(entries) - first))
    assert read_count(packed) == len(entries)
    assert list(read_entries(packed, first, count)) == entries[first : first + count]


@given(st.lists(st.integers(0, 100_000)), st.lists(st.integers(0, 100_000)))
def test_histograms_add_up(ours: list[int], theirs: list[int]) -> None:
    one, two, both = Histogram(), Histogram(), Histogram()
    for length in ours:
        one.add(length)
        both.add(length)
    for length in theirs:
        two.add(length)
        both.add(length)
    one.merge(two.buckets())
    assert one.buckets() == both.buckets()
    assert sum(count for _bound, count in both.buckets()) == len(ours) + len(theirs)
    assert all(bound == 0 or bound & (bound - 1) == 0 for bound, _count in both.buckets())


def test_a_histogram_is_drawn_with_its_bounds() -> None:
    drawn = draw_histogram(((16, 2), (32, 4)), width=4)
    assert drawn.splitlines() == ["    ≤ 16  ██ 2", "    ≤ 32  ████ 4"]
    assert draw_histogram(()) == ""
