"""The merge stage: every line once in every terminal status but `failed`; the proof, reruns, nothing left behind."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.unit.conftest import DAY, Rig, WatchedEngine, answer_of, id_range, ids, line_of
from vllm_batch_dagster.adapters.memory import EchoEngine
from vllm_batch_dagster.core.errors import StateConflict, StorageFailure
from vllm_batch_dagster.core.models import OUTPUT_PURPOSE, RequestCounts
from vllm_batch_dagster.core.ports import EngineAnswer, EngineRequest, StoredFile
from vllm_batch_dagster.core.results import ResultEntry, ResultTable, read_results
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus

S = BatchStatus


def refuse_odd_lines(request: EngineRequest) -> EngineAnswer | None:
    return answer_of(b'{"error":{"message":"odd"}}', 400) if line_of(request) % 2 else None


def stop(rig: Rig, batch_id: str, status: BatchStatus) -> None:
    if status is S.CANCELLED:
        rig.store.batches.advance(batch_id, BatchEvent.CANCEL, int(rig.clock()))
    if status is S.EXPIRED:
        rig.clock.advance(DAY)


def stored_files(rig: Rig) -> Sequence[str]:
    return sorted(path.name for path in (rig.folder / "files").rglob("*") if path.is_file())


def rewrite_results(path: Path, entries: Sequence[ResultEntry]) -> None:
    table = ResultTable(len(entries))
    for position, entry in enumerate(entries):
        table.put(position, entry)
    path.write_bytes(table.pack(""))


async def answer_chunks(rig: Rig, batch_id: str, *indexes: int) -> None:
    await rig.infer(batch_id, EchoEngine(refuse_odd_lines), only=indexes)


@pytest.mark.parametrize("status", [S.COMPLETED, S.CANCELLED, S.EXPIRED])
@pytest.mark.parametrize("answered", [(), (0,), (1, 2), (0, 1, 2)])
async def test_output_and_errors_are_the_whole_batch(rig: Rig, status: BatchStatus, answered: tuple[int, ...]) -> None:
    batch_id = rig.start(13, chunk_size=5)
    await answer_chunks(rig, batch_id, *((0, 1, 2) if status is S.COMPLETED else answered))
    stop(rig, batch_id, status)
    report = rig.merge(batch_id)
    batch, output, errors = rig.batch(batch_id), rig.output(batch_id), rig.errors(batch_id)
    assert (batch, batch.status) == (report.batch, status)
    assert len(output) + len(errors) == batch.counts.total == 13
    assert batch.counts == RequestCounts(13, len(output), len(errors))
    assert sorted([*ids(output), *ids(errors)]) == sorted(id_range(13))
    for rows in (output, errors):
        numbers = [int(name.removeprefix("id-")) for name in ids(rows)]
        assert numbers == sorted(numbers)
    assert (report.tally.output_lines, report.tally.error_lines) == (len(output), len(errors))
    code = {S.CANCELLED: "batch_cancelled", S.EXPIRED: "batch_expired"}.get(status)
    assert {row["error"]["code"] for row in errors if row["response"] is None} <= {code}
    assert {row["response"]["status_code"] for row in errors if row["response"]} <= {400}
    assert [event.type for event in rig.store.events(batch_id)] == [f"batch.{status.value}"]


@pytest.mark.parametrize("status", [S.CANCELLED, S.EXPIRED])
def test_a_batch_that_stops_before_it_is_validated_has_no_files(rig: Rig, status: BatchStatus) -> None:
    batch_id = rig.create(rig.upload(b""))
    stop(rig, batch_id, status)
    rig.merge(batch_id)
    batch = rig.batch(batch_id)
    assert (batch.status, batch.counts) == (status, RequestCounts())
    assert (batch.output_file_id, batch.error_file_id) == (None, None)


async def test_the_files_are_registered_with_what_is_in_them(rig: Rig) -> None:
    batch_id = rig.start(4)
    await answer_chunks(rig, batch_id, 0)
    rig.clock.advance(100)
    rig.merge(batch_id)
    batch = rig.batch(batch_id)
    for file_id, kind in ((batch.output_file_id, "output"), (batch.error_file_id, "errors")):
        assert file_id is not None
        file = rig.store.files.get(file_id)
        assert (file.purpose, file.filename) == (OUTPUT_PURPOSE, f"{batch_id}_{kind}.jsonl")
        assert file.bytes == sum(map(len, rig.stored_lines(file_id)))
        assert (file.created_at, file.expires_at) == (int(rig.clock()), int(rig.clock()) + 30 * DAY)


async def test_merging_again_gives_new_files_with_the_same_bytes(rig: Rig) -> None:
    batch_id = rig.start(7, chunk_size=3)
    await answer_chunks(rig, batch_id, 0, 1, 2)
    rig.merge(batch_id)
    first = rig.batch(batch_id)
    rig.clock.advance(50)
    rig.merge(batch_id)
    second = rig.batch(batch_id)
    assert first.output_file_id != second.output_file_id
    assert rig.stored_lines(first.output_file_id) == rig.stored_lines(second.output_file_id)
    assert rig.stored_lines(first.error_file_id) == rig.stored_lines(second.error_file_id)
    assert (second.status, second.completed_at, second.counts) == (S.COMPLETED, first.completed_at, first.counts)
    assert len(rig.store.events(batch_id)) == 1


async def test_a_chunk_run_again_after_completion_changes_the_files_and_not_the_status(rig: Rig) -> None:
    batch_id = rig.start(10, chunk_size=5)
    await answer_chunks(rig, batch_id, 0, 1)
    rig.merge(batch_id)
    first = rig.batch(batch_id)
    assert first.counts == RequestCounts(10, 5, 5)
    await rig.infer(batch_id, EchoEngine(), only={1}, fresh={1})
    assert rig.batch(batch_id).output_file_id == first.output_file_id
    assert batch_id in [batch.id for batch in rig.store.batches.open()]
    rig.merge(batch_id)
    second = rig.batch(batch_id)
    assert (second.status, second.completed_at) == (S.COMPLETED, first.completed_at)
    assert second.counts == RequestCounts(10, 8, 2)
    assert {second.output_file_id, second.error_file_id}.isdisjoint({first.output_file_id, first.error_file_id})
    assert ids(rig.errors(batch_id)) == ["id-1", "id-3"]
    assert len(rig.stored_lines(first.output_file_id)) == 5  # the old files stay as they were
    assert not second.is_stale


async def test_a_cancelled_batch_is_not_revived_by_a_rerun(rig: Rig) -> None:
    batch_id = rig.start(4, chunk_size=2)
    stop(rig, batch_id, S.CANCELLED)
    rig.merge(batch_id)
    engine = WatchedEngine()
    await rig.infer(batch_id, engine, only={0}, fresh={0})
    assert sorted(engine.asked) == [0, 1]
    rig.merge(batch_id)
    assert rig.batch(batch_id).status is S.CANCELLED
    assert (ids(rig.output(batch_id)), ids(rig.errors(batch_id))) == (id_range(2), id_range(2, 4))


async def test_a_result_published_while_merging_leaves_the_batch_stale(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = rig.start(4, chunk_size=2)
    await answer_chunks(rig, batch_id, 0, 1)
    real = rig.store.chunks.list

    def publish_meanwhile(batch_id: str) -> object:
        chunks = real(batch_id)
        attempt = rig.store.chunks.begin(batch_id, 0, fresh=False, run_id="meanwhile", now=0)
        summary = chunks[0].summary
        assert summary is not None
        rig.store.chunks.publish(attempt, summary, 0)
        monkeypatch.undo()
        return chunks

    monkeypatch.setattr(rig.store.chunks, "list", publish_meanwhile)
    rig.merge(batch_id)
    assert rig.batch(batch_id).is_stale


async def test_a_merge_with_a_missing_chunk_is_refused_and_changes_nothing(rig: Rig) -> None:
    batch_id = rig.start(10, chunk_size=5)
    await answer_chunks(rig, batch_id, 1)
    before, files = rig.batch(batch_id), stored_files(rig)
    with pytest.raises(StateConflict, match=r"chunks \[0\]"):
        rig.merge(batch_id)
    assert rig.batch(batch_id) == before
    assert stored_files(rig) == files


def test_a_failed_batch_has_nothing_to_merge(rig: Rig) -> None:
    batch_id = rig.create(rig.upload(b"nonsense"))
    rig.validate(batch_id)
    with pytest.raises(StateConflict, match="did not pass validation"):
        rig.merge(batch_id)
    assert rig.batch(batch_id).status is S.FAILED


@pytest.mark.parametrize("damage", ["doubled", "swapped", "lost"])
async def test_a_merge_that_fails_the_proof_leaves_no_file(rig: Rig, damage: str) -> None:
    batch_id = rig.start(6, chunk_size=6)
    await rig.infer(batch_id, EchoEngine())
    path = rig.workspace.result_path(batch_id, 0, 1)
    with path.open("rb") as packed:
        entries = list(read_results(packed).entries)
    entries[2:4] = {"doubled": [entries[2], entries[2]], "swapped": entries[3:1:-1], "lost": entries[4:6]}[damage]
    rewrite_results(path, entries)
    files = stored_files(rig)
    with pytest.raises(StorageFailure, match=r"input line [34] is missing or out of order"):
        rig.merge(batch_id)
    assert stored_files(rig) == files
    batch = rig.batch(batch_id)
    assert (batch.status, batch.output_file_id) == (S.FINALIZING, None)
    await rig.infer(batch_id, EchoEngine(), only={0}, fresh={0})
    rig.merge(batch_id)
    assert ids(rig.output(batch_id)) == id_range(6)


class FilesWithRoomForOne:
    """A file store whose disk is full when the second file is to be made durable."""

    def __init__(self, rig: Rig) -> None:
        self._files, self._created = rig.files, 0
        self.open, self.delete = rig.files.open, rig.files.delete

    def create(self, file_id: str) -> StoredFile:
        self._created += 1
        stored = self._files.create(file_id)
        return stored if self._created == 1 else _Unfit(stored)


class _Unfit:
    def __init__(self, stored: StoredFile) -> None:
        self.write, self.discard = stored.write, stored.discard

    def commit(self) -> tuple[int, str]:
        raise StorageFailure(os.strerror(28))


async def test_a_disk_that_takes_only_one_of_the_files_keeps_none(rig: Rig) -> None:
    batch_id = rig.start(4)
    await answer_chunks(rig, batch_id, 0)
    good, files = rig.files, stored_files(rig)
    rig.files = FilesWithRoomForOne(rig)
    with pytest.raises(StorageFailure, match="No space left"):
        rig.merge(batch_id)
    assert stored_files(rig) == files
    rig.files = good
    rig.merge(batch_id)
    assert rig.batch(batch_id).counts == RequestCounts(4, 2, 2)


async def test_files_of_a_merge_that_the_store_refuses_are_deleted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = rig.start(4)
    await answer_chunks(rig, batch_id, 0)
    files = stored_files(rig)
    advance = rig.store.batches.advance

    def cancelled_first(batch_id: str, event: BatchEvent, now: int, **changes: object) -> object:
        if event is BatchEvent.PUBLISHED:
            advance(batch_id, BatchEvent.CANCEL, now)
        return advance(batch_id, event, now, **changes)

    monkeypatch.setattr(rig.store.batches, "advance", cancelled_first)
    with pytest.raises(StateConflict):
        rig.merge(batch_id)
    assert stored_files(rig) == files
    monkeypatch.undo()
    rig.merge(batch_id)
    assert rig.batch(batch_id).status is S.CANCELLED
    assert rig.batch(batch_id).counts == RequestCounts(4, 2, 2)


async def test_a_merge_whose_commit_is_not_confirmed_keeps_its_files(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = rig.start(4)
    await answer_chunks(rig, batch_id, 0)
    advance = rig.store.batches.advance

    def lose_the_reply(batch_id: str, event: BatchEvent, now: int, **changes: object) -> object:
        done = advance(batch_id, event, now, **changes)
        if event is BatchEvent.PUBLISHED:
            raise StorageFailure("the connection broke")
        return done

    monkeypatch.setattr(rig.store.batches, "advance", lose_the_reply)
    with pytest.raises(StorageFailure, match="connection broke"):
        rig.merge(batch_id)
    assert rig.batch(batch_id).status is S.COMPLETED
    assert ids(rig.output(batch_id)) == ["id-0", "id-2"]
    assert ids(rig.errors(batch_id)) == ["id-1", "id-3"]


async def test_a_merge_needs_the_input_only_for_lines_without_an_answer(rig: Rig) -> None:
    batch_id = rig.start(4)
    await answer_chunks(rig, batch_id, 0)
    rig.files.delete(rig.batch(batch_id).input_file_id)
    assert rig.merge(batch_id).counts == RequestCounts(4, 2, 2)


async def test_a_stopping_merge_supersedes_the_run_that_is_still_there(rig: Rig) -> None:
    batch_id = rig.start(4)
    attempt = rig.store.chunks.begin(batch_id, 0, fresh=False, run_id="hangs", now=0)
    stop(rig, batch_id, S.CANCELLED)
    rig.merge(batch_id)
    chunk = rig.store.chunks.get(batch_id, 0)
    assert (attempt.epoch, chunk.epoch, chunk.published_epoch) == (1, 2, 2)
    assert ids(rig.errors(batch_id)) == id_range(4)
