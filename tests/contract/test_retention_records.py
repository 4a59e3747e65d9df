"""How every batch store lists and deletes what retention asks for: in memory, on SQLite and on PostgreSQL."""

import threading
from dataclasses import replace
from typing import Any

import pytest

from vllm_batch_dagster.core.claims import BATCHES, Claim, ClaimKey
from vllm_batch_dagster.core.errors import BatchError, NotFound, StateConflict
from vllm_batch_dagster.core.models import Batch, ChunkRange, ChunkSummary, File, RequestCounts, Usage
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus

NOW = 1_800_000_000
SUMMARY = ChunkSummary(RequestCounts(2, 2, 0), Usage())


def add_file(store: BatchStore, file_id: str, expires_at: int | None = None, **fields: Any) -> None:
    file = File(file_id, 12, NOW, "in.jsonl", "batch", "ab" * 32, expires_at)
    store.files.add(replace(file, **fields))


def add_batch(store: BatchStore, batch_id: str = "batch_1", **fields: Any) -> None:
    """Add a batch with one chunk that an attempt has published."""
    batch = Batch(batch_id, "file-1", "/v1/embeddings", "24h", BatchStatus.VALIDATING, NOW, NOW + 86_400)
    store.batches.add(replace(batch, **fields))
    store.chunks.plan(batch_id, [ChunkRange(0, 0, 2, 0, 100)])
    store.batches.advance(batch_id, BatchEvent.PLANNED, NOW)
    attempt = store.chunks.begin(batch_id, 0, fresh=False, run_id="run", now=NOW)
    store.chunks.publish(attempt, SUMMARY, NOW)


def end_batch(store: BatchStore, batch_id: str = "batch_1", at: int = NOW, **changes: Any) -> None:
    store.batches.advance(batch_id, BatchEvent.MERGE, at)
    version = store.batches.get(batch_id).result_version
    store.batches.advance(batch_id, BatchEvent.PUBLISHED, at, **{"merged_version": version, **changes})


def listed(store: BatchStore, by: int = NOW, purged: bool = False) -> list[str]:
    return [batch.id for batch in store.retention.ended(limit=10, by=by, purged=purged)]


class TestFiles:
    def test_those_of_every_project_come_in_pages_by_id(self, store: BatchStore) -> None:
        for number in (3, 1, 2):
            add_file(store, f"file-{number}", project_id=f"project-{number}")
        first = store.retention.files(limit=2)
        store.files.delete("file-2")
        second = store.retention.files(limit=2, after=first[-1].id)
        assert [[file.id for file in page] for page in (first, second)] == [["file-1", "file-2"], ["file-3"]]

    def test_the_expired_ones(self, store: BatchStore) -> None:
        for number, expires_at in enumerate((NOW - 1, NOW, NOW + 1, None)):
            add_file(store, f"file-{number}", expires_at)
        found = store.retention.files(limit=9, expired_by=NOW)
        assert [file.id for file in found] == ["file-0", "file-1"]

    def test_expiries_of_many(self, store: BatchStore) -> None:
        add_file(store, "file-1", NOW)
        add_file(store, "file-2", None)
        asked = ["file-1", "file-2", *(f"file-x{number}" for number in range(1_200))]
        assert store.retention.expiries(asked) == {"file-1": NOW, "file-2": None}
        assert store.retention.expiries([]) == {}


class TestEndedBatches:
    def test_open_and_stale_ones_are_left_out(self, store: BatchStore) -> None:
        for number in range(3):
            add_batch(store, f"batch_{number}")
        end_batch(store, "batch_1")
        end_batch(store, "batch_2", merged_version=0)
        assert listed(store) == ["batch_1"]

    @pytest.mark.parametrize("events", [(BatchEvent.CANCEL, BatchEvent.STOPPED), (BatchEvent.DEADLINE,)])
    def test_the_end_is_the_time_of_the_last_status(self, store: BatchStore, events: tuple[BatchEvent, ...]) -> None:
        add_batch(store)
        for event in events:
            store.batches.advance("batch_1", event, NOW + 10, merged_version=1)
        assert (listed(store, by=NOW + 9), listed(store, by=NOW + 10)) == ([], ["batch_1"])

    def test_a_failed_one_has_an_end_too(self, store: BatchStore) -> None:
        batch = Batch("batch_1", "file-1", "/v1/embeddings", "24h", BatchStatus.VALIDATING, NOW, NOW + 86_400)
        store.batches.add(batch)
        store.batches.advance("batch_1", BatchEvent.INVALID, NOW)
        assert listed(store) == ["batch_1"]

    def test_pages_go_by_id(self, store: BatchStore) -> None:
        for number in (2, 3, 1):
            add_batch(store, f"batch_{number}")
            end_batch(store, f"batch_{number}")
        page = store.retention.ended(after="batch_1", limit=1, by=NOW, purged=False)
        assert [batch.id for batch in page] == ["batch_2"]


class TestPurge:
    def test_chunks_and_attempts_go_and_the_batch_stays_as_it_was(self, store: BatchStore) -> None:
        add_batch(store)
        end_batch(store, counts=RequestCounts(2, 2, 0), output_file_id="file-7")
        before = store.batches.get("batch_1")
        store.retention.purge("batch_1", NOW + 5)

        assert not store.chunks.list("batch_1")
        assert store.batches.get("batch_1") == replace(before, purged_at=NOW + 5)
        assert [event.type for event in store.events("batch_1")] == ["batch.completed"]
        assert (listed(store), listed(store, purged=True)) == ([], ["batch_1"])

    def test_doing_it_again_changes_nothing(self, store: BatchStore) -> None:
        add_batch(store)
        end_batch(store)
        store.retention.purge("batch_1", NOW + 5)
        store.retention.purge("batch_1", NOW + 9)
        assert store.batches.get("batch_1").purged_at == NOW + 5

    def test_an_open_one_is_refused(self, store: BatchStore) -> None:
        add_batch(store)
        with pytest.raises(StateConflict, match="batch_1 is in_progress"):
            store.retention.purge("batch_1", NOW)
        assert len(store.chunks.list("batch_1")) == 1

    def test_a_stale_one_is_refused(self, store: BatchStore) -> None:
        """A chunk was run again, and nobody has merged it yet."""
        add_batch(store)
        end_batch(store)
        store.chunks.publish(store.chunks.begin("batch_1", 0, fresh=True, run_id="ui", now=NOW), SUMMARY, NOW)
        with pytest.raises(StateConflict):
            store.retention.purge("batch_1", NOW)
        assert store.chunks.get("batch_1", 0).published_epoch == 2

    def test_an_attempt_that_is_under_way_can_do_no_harm_afterwards(self, store: BatchStore) -> None:
        add_batch(store)
        end_batch(store)
        attempt = store.chunks.begin("batch_1", 0, fresh=True, run_id="ui", now=NOW)
        store.retention.purge("batch_1", NOW)
        for call in (
            lambda: store.chunks.report(attempt, 1, 0, Usage()),
            lambda: store.chunks.publish(attempt, SUMMARY, NOW),
            lambda: store.chunks.begin("batch_1", 0, fresh=False, run_id="ui", now=NOW),
        ):
            with pytest.raises(NotFound):
                call()
        assert not store.batches.get("batch_1").is_stale

    def test_an_unknown_one(self, store: BatchStore) -> None:
        with pytest.raises(NotFound):
            store.retention.purge("batch_1", NOW)

    def test_a_purge_and_a_publication_at_once_do_not_block_each_other(self, store: BatchStore) -> None:
        """One of them comes first, and the other is refused."""
        for number in range(20):
            batch_id = f"batch_{number}"
            add_batch(store, batch_id)
            end_batch(store, batch_id)
            attempt = store.chunks.begin(batch_id, 0, fresh=True, run_id="ui", now=NOW)
            start, refused = threading.Barrier(2), list[type[BatchError]]()

            def purge(batch_id: str = batch_id, start: threading.Barrier = start, refused: Any = refused) -> None:
                start.wait()
                try:
                    store.retention.purge(batch_id, NOW)
                except BatchError as error:
                    refused.append(type(error))

            other = threading.Thread(target=purge)
            other.start()
            start.wait()
            try:
                store.chunks.publish(attempt, SUMMARY, NOW)
            except BatchError as error:
                refused.append(type(error))
            other.join()
            batch = store.batches.get(batch_id)
            assert refused == ([NotFound] if batch.purged_at else [StateConflict])
            assert batch.is_stale == (batch.purged_at is None)


class TestForget:
    def test_the_record_goes_with_its_events(self, store: BatchStore) -> None:
        for batch_id in ("batch_1", "batch_2"):
            add_batch(store, batch_id)
            end_batch(store, batch_id)
            store.retention.purge(batch_id, NOW)
        store.retention.forget("batch_1")

        with pytest.raises(NotFound):
            store.batches.get("batch_1")
        assert not store.events("batch_1")
        assert store.events("batch_2")
        assert [batch.id for batch in store.batches.list().data] == ["batch_2"]
        with pytest.raises(NotFound):
            store.retention.forget("batch_1")

    def test_its_claim_is_free_again(self, store: BatchStore) -> None:
        claim = Claim(ClaimKey("default", BATCHES, "k"), "f1")
        add_batch(store)
        end_batch(store)
        store.retention.purge("batch_1", NOW)
        batch = replace(store.batches.get("batch_1"), id="batch_9", purged_at=NOW)
        assert store.batches.add(batch, claim=claim) == "batch_9"

        store.retention.forget("batch_9")

        assert store.idempotency.find(claim, NOW) is None

    def test_only_after_the_purge(self, store: BatchStore) -> None:
        add_batch(store)
        end_batch(store)
        with pytest.raises(StateConflict, match="purge it first"):
            store.retention.forget("batch_1")
        assert store.batches.get("batch_1").id == "batch_1"
