"""Chunk planning: chunks partition the input, in order, within the slots."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.byteindex import IndexEntry
from vllm_batch_dagster.core.chunking import ModelGroup, lines_per_chunk, model_groups, plan_chunks
from vllm_batch_dagster.core.models import Chunk


def entries(lengths: list[int]) -> list[IndexEntry]:
    offset, found = 0, []
    for length in lengths:
        found.append(IndexEntry(offset, length, 0, 0))
        offset += length + 1
    return found


@given(st.lists(st.integers(1, 500), min_size=1, max_size=200), st.integers(1, 50), st.integers(1, 40))
def test_chunks_partition_the_lines(lengths: list[int], size: int, slots: int) -> None:
    lines = entries(lengths)
    chunks = list(plan_chunks(lines, [ModelGroup("m", len(lines))], size, slots))
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert len(chunks) <= slots
    covered = [line for chunk in chunks for line in range(chunk.first_line, chunk.first_line + chunk.line_count)]
    assert covered == list(range(len(lines)))
    for chunk in chunks:
        last = lines[chunk.first_line + chunk.line_count - 1]
        assert chunk.offset == lines[chunk.first_line].offset
        assert chunk.offset + chunk.length == last.offset + last.length


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 30), st.integers(5, 12))
def test_a_chunk_holds_lines_of_one_model_and_the_chunks_of_a_model_are_neighbours(
    sizes: list[int], size: int, slots: int
) -> None:
    groups = [ModelGroup(f"model-{number}", lines) for number, lines in enumerate(sizes)]
    lines = entries([10] * sum(sizes))
    chunks = list(plan_chunks(lines, groups, size, slots))
    assert len(chunks) <= slots
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    model_of = [model for model, count in groups for _line in range(count)]
    covered = [
        (line, chunk.model) for chunk in chunks for line in range(chunk.first_line, chunk.first_line + chunk.line_count)
    ]
    assert covered == list(enumerate(model_of))
    assert model_groups([Chunk("batch_1", chunk) for chunk in chunks]) == tuple(groups)


def test_a_larger_batch_gets_larger_chunks_not_more_slots() -> None:
    assert lines_per_chunk(170_000, 5_000, 40) == 5_000
    assert lines_per_chunk(1_000_000, 5_000, 40) == 25_000
