"""Plans the chunks of a batch from its byte index: contiguous line ranges, deterministic, as many as fit the slots.

A chunk holds lines of one model, and the chunks of a model are neighbours: so a run swaps the engine once a model.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import NamedTuple

from vllm_batch_dagster.core.byteindex import IndexEntry
from vllm_batch_dagster.core.models import Chunk, ChunkRange


class ModelGroup(NamedTuple):
    """Consecutive lines of the byte index that are for one model."""

    model: str
    lines: int


def model_groups(chunks: Iterable[Chunk]) -> tuple[ModelGroup, ...]:
    """Return the groups that planned chunks make up, in order."""
    by_model = groupby(chunks, key=lambda chunk: chunk.range.model or "")
    return tuple(ModelGroup(model, sum(chunk.range.line_count for chunk in part)) for model, part in by_model)


def lines_per_chunk(total: int, chunk_size: int, slots: int, groups: int = 1) -> int:
    """Return how many lines a chunk takes: `chunk_size`, or more when `slots` chunks would not hold `total` lines.

    Each of the `groups` may end with a chunk that is not full. There are at most as many groups as slots.
    """
    return max(chunk_size, -(-total // (slots - groups + 1)))


def plan_chunks(
    entries: Iterable[IndexEntry], groups: Sequence[ModelGroup], chunk_size: int, slots: int
) -> Iterator[ChunkRange]:
    """Yield the chunks of all lines in order. Together they cover every line once; each but a group's last is full.

    `length` spans from the first byte of the chunk's first line to the last byte of its last line.
    """
    size = lines_per_chunk(sum(group.lines for group in groups), chunk_size, slots, max(1, len(groups)))
    remaining = iter(entries)
    index = line = 0
    for model, lines in groups:
        for first in range(0, lines, size):
            count = min(size, lines - first)
            start, end = _span(islice(remaining, count))
            yield ChunkRange(index, line, count, start, end - start, model)
            index, line = index + 1, line + count


def _span(entries: Iterator[IndexEntry]) -> tuple[int, int]:
    last = first = next(entries)
    for entry in entries:
        last = entry
    return first.offset, last.offset + last.length
