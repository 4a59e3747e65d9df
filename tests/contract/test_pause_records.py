"""The pauses of the batch store: on every implementation the same."""

from dataclasses import replace

from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.pauses import ALL, LATCHED, Pause, PauseCause
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus

NOW = 1_700_000_000
PAUSE = Pause(ALL, PauseCause.OPERATOR, "für den Umzug", NOW, NOW + 60, 2, LATCHED)


def test_a_new_store_has_none(store: BatchStore) -> None:
    assert list(store.pauses.list()) == []


def test_a_pause_comes_back_as_it_was(store: BatchStore) -> None:
    lasting = Pause("batch_1", PauseCause.ENGINE, "no such model", NOW + 1)
    store.pauses.put(lasting)
    store.pauses.put(PAUSE)
    assert list(store.pauses.list()) == [PAUSE, lasting]


def test_of_a_scope_and_a_cause_there_is_one(store: BatchStore) -> None:
    store.pauses.put(PAUSE)
    changed = replace(PAUSE, reason="other", until=None, strikes=3)
    store.pauses.put(changed)
    others = [replace(PAUSE, cause=PauseCause.GPU), replace(PAUSE, scope="batch_1")]
    for other in others:
        store.pauses.put(other)
    assert list(store.pauses.list()) == [others[0], changed, others[1]]


def test_one_is_removed_once_and_alone(store: BatchStore) -> None:
    other = replace(PAUSE, scope="batch_1")
    store.pauses.put(PAUSE)
    store.pauses.put(other)
    assert store.pauses.remove(ALL, PauseCause.OPERATOR)
    assert not store.pauses.remove(ALL, PauseCause.OPERATOR)
    assert list(store.pauses.list()) == [other]


def test_a_purged_batch_leaves_none(store: BatchStore) -> None:
    batch = Batch("batch_1", "file-1", "/v1/chat/completions", "24h", BatchStatus.VALIDATING, NOW, NOW + 60)
    store.batches.add(batch)
    store.batches.advance(batch.id, BatchEvent.INVALID, NOW)
    store.pauses.put(PAUSE)
    store.pauses.put(replace(PAUSE, scope=batch.id))
    store.retention.purge(batch.id, NOW)
    assert list(store.pauses.list()) == [PAUSE]
