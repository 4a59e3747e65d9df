"""How every batch store keeps the deliveries of its outbox: in memory, on SQLite and on PostgreSQL."""

import threading
from dataclasses import replace

import pytest

from vllm_batch_dagster.core.deliveries import DeliveryRecord, DeliveryState, claim, new_delivery, settle
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.core.webhooks import Outcome

NOW = 1_800_000_000
DEAD, DELIVERED, PENDING = DeliveryState.DEAD, DeliveryState.DELIVERED, DeliveryState.PENDING


def end(store: BatchStore, batch_id: str = "batch_1", at: int = NOW, project_id: str = "default") -> str:
    """Store a batch that has ended, and return the id of its event."""
    batch = Batch(batch_id, "file-1", "/v1/embeddings", "24h", BatchStatus.CANCELLING, NOW - 9, NOW + 9)
    store.batches.add(replace(batch, project_id=project_id, result_version=2))
    store.batches.advance(batch_id, BatchEvent.STOPPED, at, merged_version=2)
    return store.events(batch_id)[0].id


def planned(store: BatchStore, batch_id: str = "batch_1", *targets: str, at: int = NOW) -> list[DeliveryRecord]:
    """Store a batch that has ended, with deliveries to `targets` that are due at `at`."""
    event_id = end(store, batch_id, at)
    rows = [new_delivery(batch_id, event_id, target, at, version=2) for target in targets]
    store.deliveries.plan(event_id, 2, rows)
    return rows


class TestEvent:
    def test_an_event_is_planned_for_a_version(self, store: BatchStore) -> None:
        event_id = end(store)
        (event,) = store.events("batch_1")
        assert (event.version, event.planned_version, event.is_planned) == (2, None, False)
        store.deliveries.plan(event_id, 2, ())
        assert store.events("batch_1")[0].is_planned

    def test_a_new_merge_makes_it_unplanned(self, store: BatchStore) -> None:
        planned(store)
        store.batches.amend("batch_1", output_file_id="file-7")
        assert store.events("batch_1")[0].is_planned
        store.batches.amend("batch_1", merged_version=3)
        (event,) = store.events("batch_1")
        assert (event.version, event.planned_version) == (3, 2)
        assert store.deliveries.due(NOW, 9) == ["batch_1"]

    def test_a_batch_whose_merge_changes_leaves_others_alone(self, store: BatchStore) -> None:
        planned(store)
        planned(store, "batch_2")
        store.batches.amend("batch_2", merged_version=3)
        assert store.events("batch_1")[0].is_planned


class TestPlan:
    def test_what_is_planned_twice_is_there_once(self, store: BatchStore) -> None:
        first, second = planned(store, "batch_1", "handler:a", "webhook:b")
        tried = claim(first, "run", NOW + 60)
        assert store.deliveries.change(first, tried)
        store.deliveries.plan(first.event_id, 2, [first, second, replace(first, id="dlv_new")])
        assert store.deliveries.of_batch("batch_1") == [tried, second, replace(first, id="dlv_new")]

    def test_two_planners_at_once(self, store: BatchStore) -> None:
        event_id = end(store)
        rows = [new_delivery("batch_1", event_id, f"handler:{number}", NOW, version=2) for number in range(20)]
        threads = [threading.Thread(target=store.deliveries.plan, args=(event_id, 2, rows)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.deliveries.of_batch("batch_1") == rows

    def test_an_unknown_event(self, store: BatchStore) -> None:
        end(store)
        row = new_delivery("batch_1", "evt_1", "handler:a", NOW, version=2)
        with pytest.raises(NotFound):
            store.deliveries.plan("evt_1", 2, [row])
        assert not store.deliveries.of_batch("batch_1")


class TestChange:
    def test_only_of_what_was_seen(self, store: BatchStore) -> None:
        (seen,) = planned(store, "batch_1", "handler:a")
        claimed = claim(seen, "run 1", NOW + 60)
        assert store.deliveries.change(seen, claimed)
        assert not store.deliveries.change(seen, claim(seen, "run 2", NOW + 90))
        assert store.deliveries.get(seen.id) == claimed

    def test_every_field_is_kept(self, store: BatchStore) -> None:
        (seen,) = planned(store, "batch_1", "handler:a")
        for outcome in (Outcome(False, reason="näh\x1b"), Outcome(True)):
            before = store.deliveries.get(seen.id)
            after = settle(claim(before, "run", NOW), outcome, NOW + 5)
            assert store.deliveries.change(before, after)
            assert store.deliveries.get(seen.id) == after

    def test_one_of_many_claims(self, store: BatchStore) -> None:
        (seen,) = planned(store, "batch_1", "handler:a")
        start, taken = threading.Barrier(4), list[str]()

        def take(run: str) -> None:
            start.wait()
            if store.deliveries.change(seen, claim(seen, run, NOW + 60)):
                taken.append(run)

        threads = [threading.Thread(target=take, args=(f"run {number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [store.deliveries.get(seen.id).claimed_by] == taken

    def test_an_unknown_one(self, store: BatchStore) -> None:
        row = new_delivery("batch_1", "evt_1", "handler:a", NOW, version=2)
        assert not store.deliveries.change(row, row)
        with pytest.raises(NotFound):
            store.deliveries.get(row.id)


class TestListings:
    def test_due_are_those_that_wait_longest(self, store: BatchStore) -> None:
        planned(store, "batch_late", "handler:a", at=NOW + 7)
        planned(store, "batch_2", "handler:a", "webhook:b", at=NOW + 3)
        planned(store, "batch_idle")
        end(store, "batch_unplanned", at=NOW + 2)
        assert store.deliveries.due(NOW + 6, 9) == ["batch_unplanned", "batch_2"]
        assert store.deliveries.due(NOW + 7, 9) == ["batch_unplanned", "batch_2", "batch_late"]
        assert store.deliveries.due(NOW + 7, 2) == ["batch_unplanned", "batch_2"]

    @pytest.mark.parametrize("state", [DELIVERED, DEAD])
    def test_what_is_over_is_not_due(self, store: BatchStore, state: DeliveryState) -> None:
        (seen,) = planned(store, "batch_1", "handler:a")
        assert store.deliveries.change(seen, replace(seen, state=state))
        assert store.deliveries.due(NOW + 99, 9) == []

    def test_newest_first_by_state_and_project(self, store: BatchStore) -> None:
        rows = planned(store, "batch_1", "handler:a", "handler:b", "handler:c")
        event_id = end(store, "batch_2", project_id="other")
        other = new_delivery("batch_2", event_id, "handler:a", NOW, version=2, project_id="other")
        store.deliveries.plan(event_id, 2, [other])
        dead, delivered = replace(rows[1], state=DEAD), replace(rows[2], state=DELIVERED)
        assert store.deliveries.change(rows[1], dead)
        assert store.deliveries.change(rows[2], delivered)
        assert store.deliveries.list(limit=9) == [other, delivered, dead, rows[0]]
        assert store.deliveries.list(limit=2, states=(PENDING, DEAD)) == [other, dead]
        assert store.deliveries.list(limit=9, project_id="default", states=(PENDING,)) == [rows[0]]


class TestRetention:
    def test_a_batch_stays_while_something_is_still_tried(self, store: BatchStore) -> None:
        (seen,) = planned(store, "batch_1", "webhook:metadata")
        assert not store.retention.ended(limit=9, by=NOW, purged=False)
        with pytest.raises(StateConflict, match="still tried"):
            store.retention.purge("batch_1", NOW)
        assert store.deliveries.change(seen, replace(seen, state=DEAD))
        assert [batch.id for batch in store.retention.ended(limit=9, by=NOW, purged=False)] == ["batch_1"]
        store.retention.purge("batch_1", NOW)

    def test_a_replay_after_the_purge_keeps_the_record(self, store: BatchStore) -> None:
        (seen,) = planned(store, "batch_1", "webhook:metadata")
        dead = replace(seen, state=DEAD)
        assert store.deliveries.change(seen, dead)
        store.retention.purge("batch_1", NOW)
        assert store.deliveries.change(dead, seen)
        assert not store.retention.ended(limit=9, by=NOW, purged=True)
        with pytest.raises(StateConflict):
            store.retention.forget("batch_1")

    def test_deliveries_go_with_the_record(self, store: BatchStore) -> None:
        for batch_id in ("batch_1", "batch_2"):
            (seen,) = planned(store, batch_id, "handler:a")
            assert store.deliveries.change(seen, replace(seen, state=DELIVERED))
        store.retention.purge("batch_1", NOW)
        store.retention.forget("batch_1")
        assert not store.deliveries.of_batch("batch_1")
        assert len(store.deliveries.of_batch("batch_2")) == 1
