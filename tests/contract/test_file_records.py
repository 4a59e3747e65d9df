"""What every batch store does with the records of files: in memory, on SQLite and on PostgreSQL."""

from dataclasses import replace

import pytest

from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.models import File, Page
from vllm_batch_dagster.core.ports import BatchStore

NOW = 1_800_000_000


def a_file(file_id: str = "file-1", created_at: int = NOW, purpose: str = "batch") -> File:
    return File(file_id, 12, created_at, "wörter.jsonl", purpose, "ab" * 32, created_at + 60)


def ids(page: Page[File]) -> list[str]:
    return [file.id for file in page.data]


def test_a_file_comes_back_as_it_was_added(store: BatchStore) -> None:
    endless = replace(a_file("file-2"), expires_at=None, bytes=1 << 40)
    store.files.add(a_file())
    store.files.add(endless)

    assert store.files.get("file-1") == a_file()
    assert store.files.get("file-2") == endless


def test_an_id_is_taken_once(store: BatchStore) -> None:
    store.files.add(a_file())
    with pytest.raises(StateConflict, match="file-1"):
        store.files.add(replace(a_file(), filename="other"))
    assert store.files.get("file-1") == a_file()


def test_a_deleted_file_is_not_found(store: BatchStore) -> None:
    store.files.add(a_file())
    store.files.delete("file-1")

    with pytest.raises(NotFound) as missing:
        store.files.get("file-1")
    assert (missing.value.kind, missing.value.object_id) == ("file", "file-1")
    with pytest.raises(NotFound):
        store.files.delete("file-1")


def test_listing_goes_by_time_then_by_insertion(store: BatchStore) -> None:
    for file_id, created_at in (("file-b", 5), ("file-a", 5), ("file-c", 3), ("file-d", 7)):
        store.files.add(a_file(file_id, created_at))

    assert ids(store.files.list()) == ["file-d", "file-a", "file-b", "file-c"]
    assert ids(store.files.list(order="asc")) == ["file-c", "file-b", "file-a", "file-d"]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_join_to_the_whole_listing(store: BatchStore, order: str) -> None:
    for number in range(7):
        store.files.add(a_file(f"file-{number}", NOW + number // 3))
    whole = ids(store.files.list(order=order))

    page, walked = store.files.list(limit=3, order=order), []
    while True:
        walked.append(ids(page))
        if not page.has_more:
            break
        page = store.files.list(limit=3, order=order, after=page.data[-1].id)
    assert walked == [whole[:3], whole[3:6], whole[6:]]


def test_a_page_that_ends_with_the_listing_has_no_more(store: BatchStore) -> None:
    store.files.add(a_file("file-1"))
    store.files.add(a_file("file-2"))
    assert not store.files.list(limit=2).has_more
    assert store.files.list(limit=1).has_more
    assert store.files.list(after="file-1").data == ()


def test_listing_by_purpose(store: BatchStore) -> None:
    for number in range(4):
        store.files.add(a_file(f"file-{number}", NOW + number, "batch" if number % 2 else "batch_output"))

    assert ids(store.files.list(purpose="batch")) == ["file-3", "file-1"]
    assert ids(store.files.list(purpose="batch", after="file-2")) == ["file-1"]
    assert store.files.list(purpose="evals").data == ()


def test_an_unknown_cursor_is_not_found(store: BatchStore) -> None:
    with pytest.raises(NotFound):
        store.files.list(after="file-9")
