"""What every batch store does with chunks and attempts: above all, that only the newest attempt may publish."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from vllm_batch_dagster.adapters.memory import MemoryStore
from vllm_batch_dagster.adapters.store import SqlStore
from vllm_batch_dagster.adapters.store.rules import AttemptRecord
from vllm_batch_dagster.core.errors import NotFound, StaleAttempt, StateConflict
from vllm_batch_dagster.core.models import Attempt, Batch, Chunk, ChunkRange, ChunkSummary, RequestCounts, Usage
from vllm_batch_dagster.core.states import BatchStatus

Store = MemoryStore | SqlStore

NOW = 1_800_000_000
RANGES = (ChunkRange(0, 0, 10, 0, 1 << 33), ChunkRange(1, 10, 5, 1 << 33, 400, "a/model"))
SUMMARY = ChunkSummary(
    counts=RequestCounts(10, 9, 1),
    usage=Usage(100, 10, 200, 20),
    first_sent_at=NOW + 0.25,
    last_answer_at=NOW + 9.5,
    replayed=3,
    sent=7,
    latency_p50=0.5,
    latency_p95=1.5,
    finish_reasons={"stop": 8, "length": 1},
    error_codes={"400 BadRequestError": 1},
    input_lengths=((1, 4), (2, 5)),
    output_lengths=((16, 9),),
    digest="ab" * 32,
)


@pytest.fixture
def planned(store: Store) -> Store:
    store.batches.add(Batch("batch_1", "file-1", "/v1/embeddings", "24h", BatchStatus.IN_PROGRESS, NOW, NOW + 86_400))
    store.chunks.plan("batch_1", RANGES)
    return store


def begin(store: Store, index: int = 0, *, fresh: bool = False, run_id: str = "run", now: int = NOW) -> Attempt:
    return store.chunks.begin("batch_1", index, fresh=fresh, run_id=run_id, now=now)


class TestPlan:
    def test_planned_chunks_come_in_order_untouched(self, planned: Store) -> None:
        expected = [Chunk("batch_1", planned_range) for planned_range in RANGES]
        assert planned.chunks.list("batch_1") == expected
        assert planned.chunks.get("batch_1", 1) == expected[1]

    def test_what_is_not_planned_is_empty_or_not_found(self, planned: Store) -> None:
        assert planned.chunks.list("batch_9") == []
        for batch_id, index in (("batch_1", 2), ("batch_9", 0)):
            with pytest.raises(NotFound) as missing:
                planned.chunks.get(batch_id, index)
            assert (missing.value.kind, missing.value.object_id) == ("chunk", f"{batch_id}/{index}")

    def test_an_unknown_batch_cannot_be_planned(self, store: Store) -> None:
        with pytest.raises(NotFound, match="batch_9"):
            store.chunks.plan("batch_9", RANGES)

    def test_planning_again_changes_nothing(self, planned: Store) -> None:
        planned.chunks.report(begin(planned), 2, 1, Usage(4))
        before = planned.chunks.list("batch_1")
        planned.chunks.plan("batch_1", RANGES)
        assert planned.chunks.list("batch_1") == before

    def test_another_plan_replaces_one_that_nobody_began(self, planned: Store) -> None:
        other = (ChunkRange(0, 0, 15, 0, 900),)
        planned.chunks.plan("batch_1", other)
        assert [chunk.range for chunk in planned.chunks.list("batch_1")] == list(other)

    def test_another_plan_is_refused_once_an_attempt_began(self, planned: Store) -> None:
        begin(planned)
        with pytest.raises(StateConflict, match="batch_1"):
            planned.chunks.plan("batch_1", RANGES[:1])
        assert len(planned.chunks.list("batch_1")) == 2

    def test_an_empty_plan_is_no_chunk(self, planned: Store) -> None:
        planned.chunks.plan("batch_1", ())
        assert planned.chunks.list("batch_1") == []


class TestBegin:
    def test_every_attempt_takes_the_next_epoch(self, planned: Store) -> None:
        assert begin(planned) == Attempt("batch_1", 0, epoch=1, base_epoch=1, engine_failures=0)
        assert begin(planned) == Attempt("batch_1", 0, epoch=2, base_epoch=1, engine_failures=0)
        assert begin(planned, 1) == Attempt("batch_1", 1, epoch=1, base_epoch=1, engine_failures=0)

    def test_a_fresh_attempt_starts_over(self, planned: Store) -> None:
        first = begin(planned)
        planned.chunks.report(first, 3, 1, Usage(9))
        planned.chunks.give_back(first, "engine_failure", NOW)

        assert begin(planned, fresh=True) == Attempt("batch_1", 0, epoch=2, base_epoch=2, engine_failures=0)
        assert planned.chunks.get("batch_1", 0) == Chunk("batch_1", RANGES[0], epoch=2, base_epoch=2)
        assert begin(planned) == Attempt("batch_1", 0, epoch=3, base_epoch=2, engine_failures=0)

    def test_a_resumed_attempt_keeps_the_progress(self, planned: Store) -> None:
        first = begin(planned)
        planned.chunks.report(first, 3, 1, Usage(9))
        planned.chunks.give_back(first, "engine_failure", NOW)

        assert begin(planned) == Attempt("batch_1", 0, epoch=2, base_epoch=1, engine_failures=1)
        chunk = planned.chunks.get("batch_1", 0)
        assert (chunk.completed, chunk.failed, chunk.usage, chunk.engine_failures) == (3, 1, Usage(9), 1)
        assert chunk.is_unfinished

    def test_a_fresh_attempt_leaves_the_published_result_readable(self, planned: Store) -> None:
        planned.chunks.publish(begin(planned), SUMMARY, NOW)
        begin(planned, fresh=True)
        chunk = planned.chunks.get("batch_1", 0)
        assert (chunk.published_epoch, chunk.summary, chunk.completed) == (1, SUMMARY, 0)
        assert chunk.is_unfinished

    def test_a_chunk_that_is_not_planned_cannot_begin(self, planned: Store) -> None:
        with pytest.raises(NotFound):
            begin(planned, 2)

    def test_threads_that_begin_at_once_get_different_epochs(self, planned: Store) -> None:
        start = threading.Barrier(8)

        def attempt(_number: int) -> int:
            start.wait()
            return begin(planned).epoch

        with ThreadPoolExecutor(8) as pool:
            epochs = list(pool.map(attempt, range(8)))

        assert sorted(epochs) == list(range(1, 9))
        still_open = [record.epoch for record in planned.chunks.attempts("batch_1", 0) if record.ended_at is None]
        assert still_open == [8]


class TestReport:
    def test_progress_is_mirrored(self, planned: Store) -> None:
        attempt = begin(planned)
        planned.chunks.report(attempt, 3, 1, Usage(1, 2, 3, 4))
        planned.chunks.report(attempt, 5, 1, Usage(2, 3, 4, 5))
        chunk = planned.chunks.get("batch_1", 0)
        assert (chunk.completed, chunk.failed, chunk.usage) == (5, 1, Usage(2, 3, 4, 5))
        assert planned.chunks.get("batch_1", 1).completed == 0

    def test_an_older_attempt_cannot_report(self, planned: Store) -> None:
        old = begin(planned)
        begin(planned)
        with pytest.raises(StaleAttempt, match="attempt 1 at chunk 0 of batch_1 is superseded by attempt 2"):
            planned.chunks.report(old, 5, 0, Usage(1))
        assert planned.chunks.get("batch_1", 0).completed == 0

    def test_a_late_report_does_not_cover_the_published_result(self, planned: Store) -> None:
        attempt = begin(planned)
        planned.chunks.publish(attempt, SUMMARY, NOW)
        planned.chunks.report(attempt, 2, 0, Usage(1))
        chunk = planned.chunks.get("batch_1", 0)
        assert (chunk.completed, chunk.failed, chunk.usage) == (9, 1, SUMMARY.usage)

    def test_an_unknown_chunk_is_not_found(self, planned: Store) -> None:
        nowhere = Attempt("batch_1", 7, 1, 1, 0)
        with pytest.raises(NotFound):
            planned.chunks.report(nowhere, 1, 0, Usage())
        with pytest.raises(NotFound):
            planned.chunks.publish(nowhere, SUMMARY, NOW)
        with pytest.raises(NotFound):
            planned.chunks.give_back(nowhere, "stopped", NOW)


class TestPublish:
    def test_the_result_becomes_the_chunks(self, planned: Store) -> None:
        planned.chunks.publish(begin(planned), SUMMARY, NOW)

        expected = Chunk("batch_1", RANGES[0], 1, 1, 1, completed=9, failed=1, usage=SUMMARY.usage, summary=SUMMARY)
        assert planned.chunks.get("batch_1", 0) == expected
        assert not expected.is_unfinished
        assert planned.batches.get("batch_1").result_version == 1

    def test_publishing_twice_changes_nothing(self, planned: Store) -> None:
        attempt = begin(planned)
        planned.chunks.publish(attempt, SUMMARY, NOW)
        before = planned.chunks.get("batch_1", 0), planned.batches.get("batch_1")
        planned.chunks.publish(attempt, replace(SUMMARY, digest="other"), NOW + 9)
        assert (planned.chunks.get("batch_1", 0), planned.batches.get("batch_1")) == before
        assert planned.chunks.attempts("batch_1", 0)[0].ended_at == NOW

    def test_an_older_attempt_cannot_publish(self, planned: Store) -> None:
        old, new = begin(planned), begin(planned)
        with pytest.raises(StaleAttempt):
            planned.chunks.publish(old, SUMMARY, NOW)
        assert not planned.chunks.get("batch_1", 0).is_published
        assert planned.batches.get("batch_1").result_version == 0

        planned.chunks.publish(new, SUMMARY, NOW)
        assert planned.chunks.get("batch_1", 0).published_epoch == 2
        with pytest.raises(StaleAttempt):
            planned.chunks.publish(old, SUMMARY, NOW)

    def test_every_publication_raises_the_version(self, planned: Store) -> None:
        for index, fresh in ((0, False), (1, False), (0, True)):
            planned.chunks.publish(begin(planned, index, fresh=fresh), SUMMARY, NOW)
        batch = planned.batches.get("batch_1")
        assert (batch.result_version, batch.merged_version, batch.is_stale) == (3, 0, True)

    def test_what_began_and_published_at_once_is_never_stale(self, planned: Store) -> None:
        """Each thread takes an attempt and publishes it: whoever succeeds was the newest at that moment."""
        start = threading.Barrier(6)

        def work(_number: int) -> int:
            start.wait()
            attempt = begin(planned)
            try:
                planned.chunks.publish(attempt, replace(SUMMARY, digest=str(attempt.epoch)), NOW)
            except StaleAttempt:
                return 0
            return attempt.epoch

        with ThreadPoolExecutor(6) as pool:
            published = [epoch for epoch in pool.map(work, range(6)) if epoch]

        chunk = planned.chunks.get("batch_1", 0)
        assert 6 in published
        assert chunk.published_epoch == 6
        assert chunk.summary is not None
        assert chunk.summary.digest == "6"
        assert planned.batches.get("batch_1").result_version == len(published)


class TestGiveBack:
    def test_only_an_engine_failure_is_counted(self, planned: Store) -> None:
        for outcome in ("stopped", "error", "engine_failure", "engine_failure"):
            planned.chunks.give_back(begin(planned), outcome, NOW)
        assert planned.chunks.get("batch_1", 0).engine_failures == 2

    def test_giving_back_twice_counts_once(self, planned: Store) -> None:
        attempt = begin(planned)
        planned.chunks.give_back(attempt, "engine_failure", NOW)
        planned.chunks.give_back(attempt, "engine_failure", NOW + 5)
        assert planned.chunks.get("batch_1", 0).engine_failures == 1
        assert planned.chunks.attempts("batch_1", 0)[0].ended_at == NOW

    def test_a_stale_attempt_is_only_recorded(self, planned: Store) -> None:
        old = begin(planned)
        begin(planned)
        planned.chunks.give_back(old, "engine_failure", NOW + 3)
        assert planned.chunks.get("batch_1", 0).engine_failures == 0
        assert planned.chunks.attempts("batch_1", 0)[0].outcome == "engine_failure"

    def test_a_published_attempt_stays_published(self, planned: Store) -> None:
        attempt = begin(planned)
        planned.chunks.publish(attempt, SUMMARY, NOW)
        planned.chunks.give_back(attempt, "engine_failure", NOW)
        chunk = planned.chunks.get("batch_1", 0)
        assert (chunk.engine_failures, chunk.published_epoch) == (0, 1)
        assert planned.chunks.attempts("batch_1", 0)[0].outcome == "published"

    def test_the_history_tells_every_attempt(self, planned: Store) -> None:
        begin(planned, run_id="run-1", now=NOW)
        second = begin(planned, run_id="run-2", now=NOW + 1)
        planned.chunks.give_back(second, "stopped", NOW + 2)
        third = begin(planned, run_id="run-3", now=NOW + 3, fresh=True)
        planned.chunks.publish(third, SUMMARY, NOW + 4)
        begin(planned, run_id="run-4", now=NOW + 5)

        assert list(planned.chunks.attempts("batch_1", 0)) == [
            AttemptRecord(1, 1, "run-1", NOW, NOW + 1, "superseded"),
            AttemptRecord(2, 1, "run-2", NOW + 1, NOW + 2, "stopped"),
            AttemptRecord(3, 3, "run-3", NOW + 3, NOW + 4, "published"),
            AttemptRecord(4, 3, "run-4", NOW + 5, None, None),
        ]
        assert list(planned.chunks.attempts("batch_1", 1)) == []


class TestFinished:
    def test_it_is_what_was_published_for_the_model_newest_batch_first(self, store: Store) -> None:
        for number, (model, of_chunk) in enumerate((("a", None), ("b", None), (None, "a"), ("a", "a"))):
            batch_id = f"batch_{number}"
            batch = Batch(batch_id, "file-1", "/v1/x", "24h", BatchStatus.IN_PROGRESS, NOW, NOW + 1, model=model)
            store.batches.add(batch)
            store.chunks.plan(batch_id, [replace(planned, model=of_chunk) for planned in RANGES])
            for index in (1, 0):
                attempt = store.chunks.begin(batch_id, index, fresh=False, run_id="run", now=NOW)
                if number != 3 or index == 0:
                    store.chunks.publish(attempt, SUMMARY, NOW)

        found = store.chunks.finished("a", 10)

        places = [("batch_3", 0), ("batch_2", 0), ("batch_2", 1), ("batch_0", 0), ("batch_0", 1)]
        assert [(chunk.batch_id, chunk.index) for chunk in found] == places
        assert found[0].summary == SUMMARY
        assert [chunk.batch_id for chunk in store.chunks.finished("a", 2)] == ["batch_3", "batch_2"]
        assert store.chunks.finished("c", 10) == []
