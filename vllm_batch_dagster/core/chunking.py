"""Plans the chunks of a batch from its byte index: contiguous line ranges, deterministic, as many as fit the slots."""

from collections.abc import Iterable, Iterator

from vllm_batch_dagster.core.byteindex import IndexEntry
from vllm_batch_dagster.core.models import ChunkRange


def lines_per_chunk(total: int, chunk_size: int, slots: int) -> int:
    """Return how many lines a chunk takes: `chunk_size`, or more when `slots` chunks would not hold `total` lines."""
    return max(chunk_size, -(-total // slots))


def plan_chunks(entries: Iterable[IndexEntry], total: int, chunk_size: int, slots: int) -> Iterator[ChunkRange]:
    """Yield the chunks of `total` lines in order. Together they cover every line once; each but the last is full.

    `length` spans from the first byte of the chunk's first line to the last byte of its last line.
    """
    size = lines_per_chunk(total, chunk_size, slots)
    start = end = 0
    for line, entry in enumerate(entries):
        if line % size == 0:
            start = entry.offset
        end = entry.offset + entry.length
        if line % size == size - 1 or line == total - 1:
            first = line - line % size
            yield ChunkRange(line // size, first, line - first + 1, start, end - start)
