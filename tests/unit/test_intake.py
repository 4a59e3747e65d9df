"""The door of the data path (stages/intake.py) over the in-memory store and local files."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.adapters.local_files import LocalFiles
from vllm_batch_dagster.adapters.memory import MemoryStore
from vllm_batch_dagster.core.creation import FileFacts
from vllm_batch_dagster.core.errors import InvalidInput, NotFound, StateConflict, StorageFailure
from vllm_batch_dagster.core.models import Batch, File
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.stages.intake import (
    cancel_batch,
    create_batch,
    delete_file,
    find_file,
    list_files,
    receive_file,
)

NOW = 1_800_000_000
PARAMS = {"input_file_id": "file-1", "endpoint": "/v1/embeddings", "completion_window": "24h"}
BATCH_FILE = FileFacts("in.jsonl", "batch")


def clock() -> float:
    return NOW + 0.9


class Randomness:
    """Counts up, so that ids differ and tests repeat."""

    def __init__(self) -> None:
        self._drawn = 0

    def __call__(self, size: int) -> bytes:
        self._drawn += 1
        return self._drawn.to_bytes(size, "big")


class Door:
    """The intake functions with everything filled in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store: BatchStore = MemoryStore()
        self.files = LocalFiles(folder)
        self.randomness = Randomness()

    def receive(self, *blocks: bytes, facts: FileFacts = BATCH_FILE, max_bytes: int = 0) -> File:
        return self.receive_from(iter(blocks), facts, max_bytes)

    def receive_from(self, blocks: Iterator[bytes], facts: FileFacts = BATCH_FILE, max_bytes: int = 0) -> File:
        return receive_file(
            blocks,
            facts,
            store=self.store,
            files=self.files,
            clock=clock,
            randomness=self.randomness,
            max_bytes=max_bytes,
        )

    def create(self, **params: object) -> Batch:
        return create_batch({**PARAMS, **params}, self.store, clock, self.randomness)

    @property
    def stored(self) -> int:
        return sum(1 for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path / "files")


def test_a_stream_becomes_a_recorded_file(door: Door) -> None:
    file = door.receive(b"one\n", b"", b"two\n")

    assert file == File(
        id="file-" + "1".rjust(32, "0"),
        bytes=8,
        created_at=NOW,
        filename="in.jsonl",
        purpose="batch",
        sha256=hashlib.sha256(b"one\ntwo\n").hexdigest(),
        expires_at=NOW + 2_592_000,
    )
    assert door.store.files.get(file.id) == file
    with door.files.open(file.id) as reader:
        assert reader.read() == b"one\ntwo\n"


@pytest.mark.parametrize(
    ("facts", "expires_at"),
    [
        (FileFacts("f", "batch", 3600), NOW + 3600),
        (FileFacts("f", "user_data", 3600), NOW + 3600),
        (FileFacts("f", "user_data"), None),
    ],
)
def test_a_file_expires_as_asked_or_as_its_purpose_says(door: Door, facts: FileFacts, expires_at: int | None) -> None:
    assert door.receive(facts=facts).expires_at == expires_at


def test_a_file_over_the_limit_leaves_nothing(door: Door) -> None:
    assert door.receive(b"1234", b"5678", max_bytes=8).bytes == 8
    with pytest.raises(InvalidInput, match="8 bytes") as refused:
        door.receive(b"1234", b"56789", max_bytes=8)
    assert (refused.value.param, refused.value.code) == ("file", "file_too_large")
    assert door.stored == 1


def test_a_stream_that_breaks_leaves_nothing(door: Door) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half a"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        door.receive_from(broken())
    assert door.stored == 0
    assert list_all(door) == []


def test_a_record_that_cannot_be_kept_leaves_no_contents(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: File, **_: object) -> None:
        raise StorageFailure("read-only")

    monkeypatch.setattr(door.store.files, "add", refuse)
    with pytest.raises(StorageFailure):
        door.receive(b"contents")
    assert door.stored == 0


def test_an_expired_file_cannot_be_found(door: Door) -> None:
    file = door.receive(facts=FileFacts("f", "batch", 3600))

    assert find_file(file.id, door.store, NOW + 3599.9) == file
    with pytest.raises(NotFound):
        find_file(file.id, door.store, NOW + 3600)


@given(lives=st.lists(st.sampled_from([3600, 7200]), max_size=9), limit=st.integers(1, 5))
def test_pages_hold_every_live_file_once(
    tmp_path_factory: pytest.TempPathFactory, lives: list[int], limit: int
) -> None:
    door = Door(tmp_path_factory.mktemp("files"))
    made = [door.receive(facts=FileFacts("f", "batch", life)) for life in lives]

    seen: list[File] = []
    more = True
    while more:
        after = seen[-1].id if seen else None
        page = list_files(door.store, NOW + 3600, purpose=None, after=after, limit=limit, order="asc")
        assert len(page.data) == limit or not page.has_more
        seen += page.data
        more = page.has_more

    assert seen == [file for file in made if file.expires_at == NOW + 7200]


def list_all(door: Door) -> list[File]:
    return list(list_files(door.store, NOW, purpose=None, after=None, limit=100, order="desc").data)


def test_a_file_that_an_open_batch_reads_is_kept(door: Door) -> None:
    file = door.receive(b"contents")
    batch = door.create(input_file_id=file.id)

    with pytest.raises(StateConflict, match=f"{batch.id}, which is validating"):
        delete_file(file.id, door.store, door.files, NOW)
    door.store.batches.advance(batch.id, BatchEvent.INVALID, NOW)
    delete_file(file.id, door.store, door.files, NOW)

    assert (door.stored, list_all(door)) == (0, [])
    with pytest.raises(NotFound):
        delete_file(file.id, door.store, door.files, NOW)


def test_a_new_batch_is_validating_and_stored(door: Door) -> None:
    batch = door.create(metadata={"k": "v"}, output_expires_after={"anchor": "created_at", "seconds": 3600})

    assert batch == Batch(
        id="batch_" + "1".rjust(32, "0"),
        input_file_id="file-1",
        endpoint="/v1/embeddings",
        completion_window="24h",
        status=BatchStatus.VALIDATING,
        created_at=NOW,
        expires_at=NOW + 86_400,
        metadata={"k": "v"},
        output_expires_after=3600,
    )
    assert door.store.batches.get(batch.id) == batch


def test_a_refused_batch_is_not_stored(door: Door) -> None:
    with pytest.raises(InvalidInput):
        door.create(endpoint="/v1/nonsense")
    assert door.store.batches.list().data == ()


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        ((), "cancelling"),
        ((BatchEvent.PLANNED,), "cancelling"),
        ((BatchEvent.CANCEL,), "cancelling"),
        ((BatchEvent.CANCEL, BatchEvent.STOPPED), "cancelled"),
        ((BatchEvent.INVALID,), None),
        ((BatchEvent.DEADLINE,), None),
        ((BatchEvent.PLANNED, BatchEvent.MERGE, BatchEvent.PUBLISHED), None),
    ],
)
def test_cancel_follows_the_status(door: Door, events: tuple[BatchEvent, ...], outcome: str | None) -> None:
    batch = door.create()
    for event in events:
        batch = door.store.batches.advance(batch.id, event, NOW)

    if outcome is None:
        with pytest.raises(StateConflict, match=f"Cannot cancel a batch with status '{batch.status.value}'"):
            cancel_batch(batch.id, door.store, clock)
    else:
        assert cancel_batch(batch.id, door.store, clock).status.value == outcome


@pytest.mark.parametrize(("winner", "outcome"), [(BatchEvent.CANCEL, "cancelling"), (BatchEvent.INVALID, None)])
def test_cancel_that_loses_a_race_looks_again(
    door: Door, monkeypatch: pytest.MonkeyPatch, winner: BatchEvent, outcome: str | None
) -> None:
    batch = door.create()
    advance = door.store.batches.advance

    def lose(batch_id: str, event: BatchEvent, now: int) -> Batch:
        advance(batch_id, winner, now)
        return advance(batch_id, event, now)

    monkeypatch.setattr(door.store.batches, "advance", lose)
    if outcome is None:
        with pytest.raises(StateConflict, match="'failed'"):
            cancel_batch(batch.id, door.store, clock)
    else:
        assert cancel_batch(batch.id, door.store, clock).status.value == outcome
