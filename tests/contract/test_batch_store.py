"""What every batch store does with batches and their outbox: the same suite in memory, on SQLite and on PostgreSQL."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.models import (
    Batch,
    ChunkRange,
    File,
    LineError,
    RequestCounts,
    Usage,
)
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.states import TERMINAL, TIMESTAMP_FIELD, TRANSITIONS, BatchEvent, BatchStatus

NOW = 1_800_000_000
PATHS: dict[BatchStatus, tuple[BatchEvent, ...]] = {
    BatchStatus.VALIDATING: (),
    BatchStatus.FAILED: (BatchEvent.INVALID,),
    BatchStatus.IN_PROGRESS: (BatchEvent.PLANNED,),
    BatchStatus.FINALIZING: (BatchEvent.PLANNED, BatchEvent.MERGE),
    BatchStatus.COMPLETED: (BatchEvent.PLANNED, BatchEvent.MERGE, BatchEvent.PUBLISHED),
    BatchStatus.EXPIRED: (BatchEvent.PLANNED, BatchEvent.DEADLINE),
    BatchStatus.CANCELLING: (BatchEvent.PLANNED, BatchEvent.CANCEL),
    BatchStatus.CANCELLED: (BatchEvent.PLANNED, BatchEvent.CANCEL, BatchEvent.STOPPED),
}


def a_file(file_id: str = "file-1", created_at: int = NOW, purpose: str = "batch") -> File:
    return File(file_id, 12, created_at, "wörter.jsonl", purpose, "ab" * 32, created_at + 60)


def a_batch(batch_id: str = "batch_1", created_at: int = NOW, **fields: Any) -> Batch:
    batch = Batch(
        id=batch_id,
        input_file_id="file-1",
        endpoint="/v1/chat/completions",
        completion_window="24h",
        status=BatchStatus.VALIDATING,
        created_at=created_at,
        expires_at=created_at + 86_400,
    )
    return replace(batch, **fields)


def add_batch(store: BatchStore, status: BatchStatus = BatchStatus.VALIDATING, **fields: Any) -> Batch:
    """Add a batch and lead it to `status`."""
    batch = a_batch(**fields)
    store.batches.add(batch)
    for event in PATHS[status]:
        batch = store.batches.advance(batch.id, event, NOW)
    return batch


def plan(store: BatchStore, *line_counts: int, batch_id: str = "batch_1") -> None:
    store.chunks.plan(batch_id, [ChunkRange(i, 10 * i, lines, 100 * i, 100) for i, lines in enumerate(line_counts)])


def ids(values: Iterable[File | Batch]) -> list[str]:
    return [value.id for value in values]


class TestBatches:
    def test_a_batch_comes_back_as_it_was_added(self, store: BatchStore) -> None:
        full = a_batch(
            metadata={"team": "søk", "": ""},
            output_expires_after=3_600,
            model="tiny",
            errors=(LineError("invalid_json", "Not JSON.", None, 3), LineError("empty_file", "Empty.", "file", None)),
            counts=RequestCounts(3, 2, 1),
            usage=Usage(5, 4, 3, 2),
            output_file_id="file-2",
            error_file_id="file-3",
            result_version=2,
            merged_version=1,
        )
        store.batches.add(full)
        store.batches.add(a_batch("batch_2"))

        assert store.batches.get("batch_1") == full
        assert store.batches.get("batch_2") == a_batch("batch_2")

    def test_an_id_is_taken_once(self, store: BatchStore) -> None:
        add_batch(store)
        with pytest.raises(StateConflict, match="batch_1"):
            store.batches.add(a_batch(model="other"))
        assert store.batches.get("batch_1").model is None

    def test_an_unknown_batch_is_not_found(self, store: BatchStore) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.batches.get("batch_9"),
            lambda: store.batches.list(after="batch_9"),
            lambda: store.batches.advance("batch_9", BatchEvent.CANCEL, NOW),
            lambda: store.batches.amend("batch_9", model="tiny"),
            lambda: store.batches.amend("batch_9"),
        ]
        for call in calls:
            with pytest.raises(NotFound) as missing:
                call()
            assert (missing.value.kind, missing.value.object_id) == ("batch", "batch_9")

    def test_listing_is_newest_first_in_pages(self, store: BatchStore) -> None:
        for batch_id, created_at in (("batch_b", 5), ("batch_a", 5), ("batch_c", 3)):
            store.batches.add(a_batch(batch_id, created_at))

        first = store.batches.list(limit=2)
        assert (ids(first.data), first.has_more) == (["batch_a", "batch_b"], True)
        second = store.batches.list(limit=2, after="batch_b")
        assert (ids(second.data), second.has_more) == (["batch_c"], False)

    def test_open_lists_what_needs_attention_oldest_first(self, store: BatchStore) -> None:
        for number, status in enumerate(BatchStatus):
            add_batch(store, status, batch_id=f"batch_{status.value}", created_at=NOW - number)
        store.batches.add(a_batch("batch_stale", NOW + 1, status=BatchStatus.COMPLETED, result_version=2))

        attention = [f"batch_{status.value}" for status in reversed(BatchStatus) if status not in TERMINAL]
        assert ids(store.batches.open()) == [*attention, "batch_stale"]


class TestAdvance:
    @pytest.mark.parametrize("status", BatchStatus)
    @pytest.mark.parametrize("event", BatchEvent)
    def test_the_store_moves_as_the_table_says(self, status: BatchStatus, event: BatchEvent, store: BatchStore) -> None:
        before = add_batch(store, status)
        entered = TRANSITIONS.get((status, event))
        if entered is None:
            with pytest.raises(StateConflict, match="batch_1"):
                store.batches.advance("batch_1", event, NOW + 5, model="changed", files=[a_file()])
            assert store.batches.get("batch_1") == before
            assert store.files.list().data == ()
        else:
            moved = store.batches.advance("batch_1", event, NOW + 5, model="changed", files=[a_file()])
            changed: dict[str, Any] = {"status": entered, "model": "changed", TIMESTAMP_FIELD[entered]: NOW + 5}
            after = replace(before, **changed)
            assert moved == store.batches.get("batch_1") == after
            assert store.files.get("file-1") == a_file()

    def test_times_never_go_back(self, store: BatchStore) -> None:
        store.batches.add(a_batch())
        assert store.batches.advance("batch_1", BatchEvent.PLANNED, NOW - 100).in_progress_at == NOW
        assert store.batches.advance("batch_1", BatchEvent.MERGE, NOW + 50).finalizing_at == NOW + 50
        assert store.batches.advance("batch_1", BatchEvent.CANCEL, NOW + 20).cancelling_at == NOW + 50
        done = store.batches.advance("batch_1", BatchEvent.STOPPED, NOW)
        assert done.cancelled_at == NOW + 50
        assert store.events("batch_1")[0].created_at == NOW + 50

    def test_every_kind_of_change_is_stored(self, store: BatchStore) -> None:
        add_batch(store, BatchStatus.FINALIZING)
        changes: dict[str, Any] = {
            "counts": RequestCounts(4, 3, 1),
            "usage": Usage(9, 8, 7, 6),
            "errors": (LineError("invalid", "Bad.", "body", 2),),
            "model": "tiny",
            "metadata": {"a": "b"},
            "output_file_id": "file-o",
            "error_file_id": "file-e",
            "expires_at": NOW + 7,
            "merged_version": 3,
        }
        moved = store.batches.advance("batch_1", BatchEvent.PUBLISHED, NOW, **changes)

        assert {name: getattr(moved, name) for name in changes} == changes
        assert store.batches.get("batch_1") == moved

    def test_a_change_to_none_is_stored(self, store: BatchStore) -> None:
        add_batch(store, output_file_id="file-o", usage=Usage(1), metadata={"a": "b"})
        amended = store.batches.amend("batch_1", output_file_id=None, usage=None, metadata=None)
        assert (amended.output_file_id, amended.usage, amended.metadata) == (None, None, None)

    @pytest.mark.parametrize("name", ["colour", "status", "id", "created_at", "result_version", "completed_at"])
    def test_only_known_and_free_fields_can_be_changed(self, store: BatchStore, name: str) -> None:
        before, change = add_batch(store), dict[str, Any]({name: 1})
        with pytest.raises(TypeError, match=name):
            store.batches.advance("batch_1", BatchEvent.CANCEL, NOW, **change)
        with pytest.raises(TypeError, match=name):
            store.batches.amend("batch_1", **change)
        assert store.batches.get("batch_1") == before

    def test_a_taken_file_id_undoes_the_whole_step(self, store: BatchStore) -> None:
        before = add_batch(store, BatchStatus.FINALIZING)
        store.files.add(a_file("file-2"))
        new = [a_file("file-3"), a_file("file-2")]

        with pytest.raises(StateConflict):
            store.batches.advance("batch_1", BatchEvent.PUBLISHED, NOW, files=new, output_file_id="file-3")
        with pytest.raises(StateConflict):
            store.batches.amend("batch_1", files=new, output_file_id="file-3")

        assert store.batches.get("batch_1") == before
        assert ids(store.files.list().data) == ["file-2"]
        assert store.events("batch_1") == []

    @pytest.mark.parametrize("status", sorted(TERMINAL))
    def test_an_end_writes_one_outbox_event(self, store: BatchStore, status: BatchStatus) -> None:
        ended = add_batch(store, status)
        store.batches.amend("batch_1", files=[a_file()], output_file_id="file-1", merged_version=5)

        (event,) = store.events("batch_1")
        assert (event.batch_id, event.type) == ("batch_1", f"batch.{status.value}")
        assert event.created_at == getattr(ended, TIMESTAMP_FIELD[status])
        assert event.id.startswith("evt_")

    @pytest.mark.parametrize("status", sorted(set(BatchStatus) - TERMINAL))
    def test_a_step_on_the_way_writes_no_event(self, store: BatchStore, status: BatchStatus) -> None:
        add_batch(store, status)
        assert list(store.events("batch_1")) == []

    def test_events_have_ids_of_their_own(self, store: BatchStore) -> None:
        for number in range(3):
            add_batch(store, BatchStatus.FAILED, batch_id=f"batch_{number}")
        assert len({store.events(f"batch_{number}")[0].id for number in range(3)}) == 3

    def test_eight_threads_advance_and_one_wins(self, store: BatchStore) -> None:
        add_batch(store, BatchStatus.FINALIZING)
        start, outcomes = threading.Barrier(8), []

        def publish(number: int) -> None:
            start.wait()
            try:
                file = a_file(f"file-{number}")
                store.batches.advance("batch_1", BatchEvent.PUBLISHED, NOW, files=[file], output_file_id=file.id)
                outcomes.append(file.id)
            except StateConflict:
                outcomes.append("")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(publish, range(8)))

        (winner,) = filter(None, outcomes)
        assert len(outcomes) == 8
        assert store.batches.get("batch_1").output_file_id == winner
        assert ids(store.files.list().data) == [winner]
        assert len(store.events("batch_1")) == 1

    def test_cancel_and_progress_at_once_lose_neither(self, store: BatchStore) -> None:
        """A cancel is legal in every open status, so it must succeed whatever happens beside it."""
        for number in range(10):
            batch_id = f"batch_{number}"
            store.batches.add(a_batch(batch_id))
            with ThreadPoolExecutor(2) as pool:
                start = threading.Barrier(2)
                cancelled = pool.submit(cancel, store, batch_id, start)
                pool.submit(progress, store, batch_id, start).result()
            assert cancelled.result().status is BatchStatus.CANCELLING
            assert store.batches.get(batch_id) == cancelled.result()


def cancel(store: BatchStore, batch_id: str, start: threading.Barrier) -> Batch:
    start.wait()
    return store.batches.advance(batch_id, BatchEvent.CANCEL, NOW)


def progress(store: BatchStore, batch_id: str, start: threading.Barrier) -> None:
    """Take steps until the cancel forbids them."""
    start.wait()
    for event in (BatchEvent.PLANNED, BatchEvent.MERGE):
        try:
            store.batches.advance(batch_id, event, NOW)
        except StateConflict:
            return
