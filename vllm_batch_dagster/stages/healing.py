"""Makes the store follow the disk where they disagree: after a backup of one of them was put back, or a file was lost.

Truth is, from the strongest: journal, published result, materialization, store (design section 5). What the graph shows
and the store does not know needs nothing here: such a chunk counts as missing and is run again (core/reconciling.py).
Called by the sensor, the chunk run and the merge before they believe the store.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from vllm_batch_dagster.core.errors import CorruptJournal
from vllm_batch_dagster.core.models import Attempt, Batch, Chunk
from vllm_batch_dagster.core.ports import BatchStore, Workspace


def without_lost_results(chunks: Sequence[Chunk], workspace: Workspace) -> list[Chunk]:
    """Return `chunks`, those whose published result is not on the disk as if they had never been published: an attempt
    then sends what the journals do not answer, and publishes again."""
    return [
        replace(chunk, published_epoch=0, summary=None) if _has_lost_result(chunk, workspace) else chunk
        for chunk in chunks
    ]


def _has_lost_result(chunk: Chunk, workspace: Workspace) -> bool:
    return chunk.is_published and not workspace.result_path(chunk.batch_id, chunk.index, chunk.published_epoch).exists()


@contextmanager
def dropped_when_damaged(batch: Batch, chunk: Chunk, workspace: Workspace) -> Iterator[None]:
    """Let go of the published result of `chunk` when a journal that it points into is damaged or gone, and raise on.

    The chunk then counts as unpublished (`without_lost_results`), so the sensor has it run again, and only what no
    journal answers is sent. A batch that has ended keeps its result: nobody runs its chunks again without being asked.
    """
    try:
        yield
    except CorruptJournal as error:
        if batch.is_terminal:
            raise
        workspace.result_path(chunk.batch_id, chunk.index, chunk.published_epoch).unlink(missing_ok=True)
        raise CorruptJournal(f"chunk {chunk.index} is run again by itself, because {error}") from error


def take_epoch(store: BatchStore, workspace: Workspace, chunk: Chunk, *, fresh: bool, run_id: str, now: int) -> Attempt:
    """Take the next epoch of `chunk` that has no journal. A store from a backup counts from an older one than the disk:
    what those journals answer stands, unless the attempt begins `fresh`. Raises NotFound."""
    attempt = store.chunks.begin(chunk.batch_id, chunk.index, fresh=fresh, run_id=run_id, now=now)
    while workspace.journal_path(chunk.batch_id, chunk.index, attempt.epoch).exists():
        attempt = store.chunks.begin(chunk.batch_id, chunk.index, fresh=fresh, run_id=run_id, now=now)
    return attempt
