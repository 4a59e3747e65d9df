"""What every batch store shows of a batch's progress: sums over its chunks while it is open, then what was stored."""

from dataclasses import replace
from typing import Any

from vllm_batch_dagster.core.models import Batch, ChunkRange, ChunkSummary, RequestCounts, Usage
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus

NOW = 1_800_000_000


def a_batch(status: BatchStatus = BatchStatus.VALIDATING) -> Batch:
    return Batch("batch_1", "file-1", "/v1/embeddings", "24h", status, NOW, NOW + 86_400)


def plan(store: BatchStore, *line_counts: int) -> None:
    store.chunks.plan("batch_1", [ChunkRange(i, 10 * i, lines, 100 * i, 100) for i, lines in enumerate(line_counts)])


def test_an_open_batch_shows_the_sums_of_its_chunks(store: BatchStore) -> None:
    store.batches.add(a_batch())
    plan(store, 10, 10)
    store.batches.advance("batch_1", BatchEvent.PLANNED, NOW, counts=RequestCounts(total=20))
    for index, (completed, failed) in enumerate([(3, 1), (5, 0)]):
        attempt = store.chunks.begin("batch_1", index, fresh=False, run_id="run", now=NOW)
        store.chunks.report(attempt, completed, failed, Usage(10, 1, 20, 2))

    expected = RequestCounts(20, 8, 1), Usage(20, 2, 40, 4)
    for batch in (store.batches.get("batch_1"), *store.batches.list().data, *store.batches.open()):
        assert (batch.counts, batch.usage) == expected


def test_lines_that_validation_refused_have_failed_from_the_start(store: BatchStore) -> None:
    store.batches.add(a_batch())
    plan(store, 10)
    store.batches.advance("batch_1", BatchEvent.PLANNED, NOW, counts=RequestCounts(total=13), rejected=3)
    assert store.batches.get("batch_1").counts == RequestCounts(13, 0, 3)
    attempt = store.chunks.begin("batch_1", 0, fresh=False, run_id="run", now=NOW)
    store.chunks.report(attempt, 5, 1, Usage())
    assert [batch.counts for batch in store.batches.open()] == [RequestCounts(13, 5, 4)]
    assert store.batches.get("batch_1").rejected == 3


def test_an_open_batch_without_chunks_shows_what_is_stored(store: BatchStore) -> None:
    batch = replace(a_batch(), counts=RequestCounts(3, 2, 1))
    store.batches.add(batch)
    assert store.batches.get("batch_1") == batch
    assert batch.usage is None


def test_the_end_keeps_what_was_shown(store: BatchStore) -> None:
    store.batches.add(a_batch(BatchStatus.IN_PROGRESS))
    plan(store, 10)
    attempt = store.chunks.begin("batch_1", 0, fresh=False, run_id="run", now=NOW)
    store.chunks.report(attempt, 4, 2, Usage(7))
    ended = store.batches.advance("batch_1", BatchEvent.DEADLINE, NOW)

    assert (ended.counts, ended.usage) == (RequestCounts(0, 4, 2), Usage(7))
    assert store.batches.get("batch_1") == ended


def test_the_counts_of_an_ended_batch_do_not_move_with_a_rerun(store: BatchStore) -> None:
    store.batches.add(a_batch(BatchStatus.FINALIZING))
    plan(store, 10)
    final: dict[str, Any] = {"counts": RequestCounts(10, 9, 1), "usage": Usage(5)}
    ended = store.batches.advance("batch_1", BatchEvent.PUBLISHED, NOW, **final)
    attempt = store.chunks.begin("batch_1", 0, fresh=True, run_id="run", now=NOW)
    store.chunks.report(attempt, 2, 0, Usage(1))
    assert store.batches.get("batch_1") == ended

    summary = ChunkSummary(RequestCounts(10, 10, 0), Usage(6))
    store.chunks.publish(attempt, summary, NOW)
    assert store.batches.get("batch_1") == replace(ended, result_version=1)
    amended = store.batches.amend("batch_1", counts=summary.counts, usage=summary.usage, merged_version=1)
    assert (amended.counts, amended.usage, amended.is_stale) == (summary.counts, summary.usage, False)
    assert store.batches.open() in ([], ())
