"""Uploads in parts (stages/uploads.py): from parts to a file, through interruptions and races."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.upload_desk import Desk, Killed, kill_at, no_cleaning
from vllm_batch_dagster.core.errors import InvalidInput, NotFound, StateConflict, StorageFailure
from vllm_batch_dagster.core.models import File
from vllm_batch_dagster.core.ports import BatchStore, StoredFile
from vllm_batch_dagster.core.uploads import Completion, Upload, UploadStatus
from vllm_batch_dagster.stages.uploads import PartReceipt, cancel_upload, complete_upload, create_upload, find_upload

HOUR = 3600


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "files")


def test_parts_become_a_file_and_leave(desk: Desk) -> None:
    upload, wanted = desk.fill()
    desk.clock.advance(50)

    file = desk.complete(upload, wanted)

    assert (file.bytes, file.created_at, file.expires_at) == (6, int(desk.clock()), int(desk.clock()) + 2_592_000)
    assert desk.read(file) == b"abcdef"
    assert desk.stored == [file.id]
    assert desk.store.uploads.parts(upload.id) == []
    assert desk.complete(upload, wanted) == file


def test_a_part_that_is_given_up_never_was(desk: Desk) -> None:
    upload = desk.begin()
    receipt = PartReceipt(upload, desk.ports)
    receipt.write(b"half")
    receipt.abandon()
    assert (desk.stored, desk.store.uploads.parts(upload.id)) == ([], [])


@pytest.mark.parametrize("end", [UploadStatus.CANCELLED, UploadStatus.EXPIRED])
def test_a_part_that_arrives_behind_the_end_is_refused_and_removed(desk: Desk, end: UploadStatus) -> None:
    upload = desk.begin()
    receipt = PartReceipt(upload, desk.ports)
    receipt.write(b"abc")
    desk.store.uploads.close(upload.id, end)

    with pytest.raises(InvalidInput, match=end.value):
        receipt.finish()
    assert desk.stored == []


def test_a_part_of_a_forgotten_upload_is_removed(desk: Desk) -> None:
    upload = desk.begin()
    receipt = PartReceipt(upload, desk.ports)
    receipt.write(b"abc")
    desk.store.uploads.delete(upload.id)

    with pytest.raises(NotFound):
        receipt.finish()
    assert desk.stored == []


@pytest.mark.parametrize("after", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("step", ["begin_completion", "create", "complete", "drop_parts"])
def test_a_completion_that_is_killed_is_done_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    upload, wanted = desk.fill()
    files_before = desk.store.files.list().data
    owner = desk.files if step == "create" else desk.store.uploads
    with monkeypatch.context() as patch:
        no_cleaning(patch)
        kill_at(patch, owner, step, after=after)
        with pytest.raises(Killed):
            desk.complete(upload, wanted)
    is_done = step == "drop_parts" or (step == "complete" and after)
    assert (desk.status(upload), len(desk.store.files.list().data)) == ("completed" if is_done else "pending", is_done)
    assert files_before == ()

    desk.files.sweep()  # as a start of the stack does
    file = desk.complete(upload, wanted)

    assert desk.read(file) == b"abcdef"
    assert desk.store.files.list().data == (file,)
    assert desk.stored == [file.id], "the retry leaves nothing of the attempt before, nor the parts"


def test_a_completion_that_gives_up_leaves_the_upload_as_it_was(desk: Desk) -> None:
    upload, wanted = desk.fill()
    parts, blocks = desk.stored, iter([None])

    def stop() -> None:
        if next(blocks, "over") == "over":
            raise Killed

    with pytest.raises(Killed):
        desk.complete(upload, wanted, stop)
    assert (desk.status(upload), desk.stored) == ("pending", parts)
    assert desk.read(desk.complete(upload, wanted)) == b"abcdef"


def test_a_full_disk_leaves_the_parts_for_another_try(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, wanted = desk.fill()
    parts = desk.stored
    create = desk.files.create

    def create_on_full_disk(file_id: str) -> StoredFile:
        stored = create(file_id)

        def write(data: bytes) -> None:
            raise StorageFailure("cannot write") from OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(stored, "write", write)
        return stored

    with monkeypatch.context() as patch:
        patch.setattr(desk.files, "create", create_on_full_disk)
        with pytest.raises(StorageFailure):
            desk.complete(upload, wanted)
    assert (desk.status(upload), desk.stored) == ("pending", parts)
    assert desk.read(desk.complete(upload, wanted)) == b"abcdef"


def test_a_reply_of_the_store_that_is_lost_loses_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, wanted = desk.fill()
    complete = desk.store.uploads.complete

    def lose_the_reply(*args: object, **claim: object) -> Upload:
        complete(*args, **claim)  # type: ignore[arg-type]
        raise StorageFailure("the connection was closed")

    with monkeypatch.context() as patch:
        patch.setattr(desk.store.uploads, "complete", lose_the_reply)
        with pytest.raises(StorageFailure):
            desk.complete(upload, wanted)

    file = desk.complete(upload, wanted)
    assert (desk.read(file), desk.stored) == (b"abcdef", [file.id])


def test_of_two_processes_one_completes_and_the_other_finds_it_done(desk: Desk) -> None:
    upload, wanted = desk.fill()
    made: list[File] = []

    def let_the_other_finish() -> None:
        if not made:
            made.append(complete_upload(upload, wanted, desk.ports)[1])

    file = desk.complete(upload, wanted, let_the_other_finish)

    assert made == [file]
    assert desk.store.files.list().data == (file,)
    assert desk.stored == [file.id]


def test_who_lost_the_upload_to_one_that_is_not_done_says_so(desk: Desk) -> None:
    upload, wanted = desk.fill()

    with pytest.raises(StateConflict, match="by another call"):
        desk.complete(upload, wanted, lambda: desk.store.uploads.begin_completion(upload.id, "file-other") and None)
    assert desk.status(upload) == "pending"
    assert [name for name in desk.stored if not name.startswith(".parts")] == []


@pytest.mark.parametrize("end", [UploadStatus.CANCELLED, UploadStatus.EXPIRED])
def test_an_end_in_the_middle_of_a_completion_wins(desk: Desk, end: UploadStatus) -> None:
    upload, wanted = desk.fill()

    def close() -> None:
        if desk.store.uploads.get(upload.id).is_pending:
            if end is UploadStatus.CANCELLED:
                cancel_upload(upload, desk.ports)
            else:
                desk.clock.advance(HOUR)
                find_upload(upload.id, desk.ports)

    with pytest.raises(InvalidInput, match=end.value):
        desk.complete(upload, wanted, close)
    assert (desk.stored, desk.store.files.list().data) == ([], ())


def test_a_part_that_vanished_from_the_disk_is_no_empty_part(desk: Desk) -> None:
    upload, wanted = desk.fill()
    desk.files.parts.delete(upload.id)
    with pytest.raises(StorageFailure, match="gone from the disk"):
        desk.complete(upload, wanted)
    assert desk.store.files.list().data == ()


def test_a_part_that_was_cut_on_the_disk_makes_no_file(desk: Desk) -> None:
    upload, wanted = desk.fill()
    path = desk.folder / ".parts" / f"{upload.id}.{wanted.part_ids[0]}"
    path.write_bytes(b"a")
    with pytest.raises(StorageFailure, match="lost bytes"):
        desk.complete(upload, wanted)
    assert [name for name in desk.stored if not name.startswith(".parts")] == []


def test_an_upload_of_more_than_the_server_takes_is_refused(desk: Desk) -> None:
    params = {"filename": "f", "purpose": "batch", "bytes": 9, "mime_type": "text/plain"}
    assert create_upload(params, desk.ports, max_bytes=9).bytes == 9
    with pytest.raises(InvalidInput) as refused:
        create_upload(params, desk.ports, max_bytes=8)
    assert (refused.value.param, refused.value.code) == ("bytes", "file_too_large")


def test_the_project_goes_from_the_upload_to_its_file(desk: Desk) -> None:
    upload, wanted = desk.fill()
    store: BatchStore = desk.store
    mine = replace(upload, id="upload_mine", project_id="mine", bytes=0)
    store.uploads.add(mine)

    assert complete_upload(mine, Completion(()), desk.ports)[1].project_id == "mine"
    assert desk.complete(upload, wanted).project_id == "default"
    with pytest.raises(NotFound):
        find_upload("upload_mine", desk.ports, "default")
