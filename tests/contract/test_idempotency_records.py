"""Claims, projects and sums of the batch store: on every implementation the same."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from vllm_batch_dagster.core.claims import BATCHES, CLAIM_SECONDS, FILES, Claim, ClaimKey
from vllm_batch_dagster.core.errors import ClaimConflict, NotFound, StateConflict
from vllm_batch_dagster.core.models import Batch, File
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.states import BatchStatus

NOW = 1_700_000_000
CALLS = 8


def a_claim(fingerprint: str = "f1", *, project_id: str = "a", operation: str = FILES, key: str = "k") -> Claim:
    return Claim(ClaimKey(project_id, operation, key), fingerprint)


def a_file(file_id: str, project_id: str = "a", created_at: int = NOW) -> File:
    return File(file_id, 12, created_at, "in.jsonl", "batch", "ab" * 32, created_at + 60, project_id)


def a_batch(batch_id: str, project_id: str = "a", created_at: int = NOW) -> Batch:
    batch = Batch(batch_id, "file-1", "/v1/embeddings", "24h", BatchStatus.VALIDATING, created_at, created_at + 60)
    return replace(batch, project_id=project_id)


def test_the_second_call_of_a_claim_gets_the_first_file(store: BatchStore) -> None:
    assert store.files.add(a_file("file-1"), claim=a_claim()) == "file-1"
    assert store.files.add(a_file("file-2"), claim=a_claim()) == "file-1"
    assert [file.id for file in store.files.list().data] == ["file-1"]


def test_the_second_call_of_a_claim_gets_the_first_batch(store: BatchStore) -> None:
    claim = a_claim(operation=BATCHES)
    assert store.batches.add(a_batch("batch_1"), claim=claim) == "batch_1"
    assert store.batches.add(a_batch("batch_2"), claim=claim) == "batch_1"
    assert [batch.id for batch in store.batches.list().data] == ["batch_1"]


def test_the_same_key_with_another_body_makes_nothing(store: BatchStore) -> None:
    store.files.add(a_file("file-1"), claim=a_claim("f1"))
    with pytest.raises(ClaimConflict):
        store.files.add(a_file("file-2"), claim=a_claim("f2"))
    with pytest.raises(ClaimConflict):
        store.idempotency.find(a_claim("f2"), NOW)
    assert [file.id for file in store.files.list().data] == ["file-1"]


@pytest.mark.parametrize("other", [a_claim(project_id="b"), a_claim(operation=BATCHES), a_claim(key="K")])
def test_projects_operations_and_keys_do_not_share_claims(store: BatchStore, other: Claim) -> None:
    store.files.add(a_file("file-1"), claim=a_claim())
    assert store.files.add(a_file("file-2"), claim=other) == "file-2"


def test_a_claim_is_found_for_a_day(store: BatchStore) -> None:
    store.files.add(a_file("file-1"), claim=a_claim())
    last = NOW + CLAIM_SECONDS - 1

    assert store.idempotency.find(a_claim(), last) == "file-1"
    assert store.idempotency.is_known(a_claim().key, last)
    assert store.idempotency.find(a_claim(), last + 1) is None
    assert not store.idempotency.is_known(a_claim().key, last + 1)
    assert store.files.add(a_file("file-2", created_at=last + 1), claim=a_claim("f2")) == "file-2"
    assert store.idempotency.find(a_claim("f2"), last + 1) == "file-2"


def test_a_call_that_failed_leaves_its_claim_free(store: BatchStore) -> None:
    store.files.add(a_file("file-1"))
    store.batches.add(a_batch("batch_1"))
    with pytest.raises(StateConflict):
        store.files.add(a_file("file-1"), claim=a_claim())
    with pytest.raises(StateConflict):
        store.batches.add(a_batch("batch_1"), claim=a_claim(operation=BATCHES))
    assert store.idempotency.find(a_claim(), NOW) is None
    assert store.idempotency.find(a_claim(operation=BATCHES), NOW) is None


def test_a_deleted_file_gives_its_claim_free(store: BatchStore) -> None:
    store.files.add(a_file("file-1"), claim=a_claim())
    store.files.delete("file-1")
    assert store.files.add(a_file("file-2"), claim=a_claim("f2")) == "file-2"


def test_of_many_calls_at_once_one_makes_the_object(store: BatchStore) -> None:
    def call(number: int) -> str:
        return store.batches.add(a_batch(f"batch_{number}"), claim=a_claim(operation=BATCHES))

    with ThreadPoolExecutor(CALLS) as pool:
        kept = set(pool.map(call, range(CALLS)))
    assert {batch.id for batch in store.batches.list().data} == kept
    assert len(kept) == 1


def test_objects_of_another_project_are_unknown(store: BatchStore) -> None:
    for number, project_id in enumerate("aab"):
        store.files.add(a_file(f"file-{number}", project_id))
        store.batches.add(a_batch(f"batch_{number}", project_id))

    assert store.files.get("file-2", project_id="b") == store.files.get("file-2") == a_file("file-2", "b")
    assert store.batches.get("batch_2", project_id="b") == store.batches.get("batch_2") == a_batch("batch_2", "b")
    for kind, get in (("file", store.files.get), ("batch", store.batches.get)):
        name = f"{kind}-2" if kind == "file" else f"{kind}_2"
        with pytest.raises(NotFound) as caught:
            get(name, project_id="a")
        assert (caught.value.kind, caught.value.object_id) == (kind, name)


def test_listings_and_cursors_stay_within_the_project(store: BatchStore) -> None:
    for number, project_id in enumerate("abab"):
        store.files.add(a_file(f"file-{number}", project_id))
        store.batches.add(a_batch(f"batch_{number}", project_id))

    assert [file.id for file in store.files.list(project_id="a").data] == ["file-2", "file-0"]
    assert [file.id for file in store.files.list(project_id="a", purpose="batch", order="asc").data] == [
        "file-0",
        "file-2",
    ]
    assert [batch.id for batch in store.batches.list(project_id="b").data] == ["batch_3", "batch_1"]
    assert [batch.id for batch in store.batches.list(project_id="b", after="batch_3").data] == ["batch_1"]
    assert not store.files.list(project_id="a", limit=2).has_more
    assert store.files.list(project_id="c").data == ()
    with pytest.raises(NotFound):
        store.files.list(project_id="a", after="file-1")
    with pytest.raises(NotFound):
        store.batches.list(project_id="a", after="batch_1")


def test_the_bytes_of_a_project_are_those_of_its_live_files(store: BatchStore) -> None:
    for number, project_id in enumerate("aab"):
        store.files.add(a_file(f"file-{number}", project_id))
    store.files.add(replace(a_file("file-old"), expires_at=NOW))
    store.files.add(replace(a_file("file-kept"), expires_at=None))

    assert store.files.stored_bytes("a", NOW) == 36
    assert store.files.stored_bytes("b", NOW) == 12
    assert store.files.stored_bytes("c", NOW) == 0
    assert store.files.stored_bytes("a", NOW + 60) == 12
