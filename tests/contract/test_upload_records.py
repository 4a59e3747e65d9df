"""What every batch store does with the records of uploads, and every file store with the contents of their parts."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_batch_dagster.adapters.local_files import LocalFiles
from vllm_batch_dagster.adapters.memory import MemoryFiles
from vllm_batch_dagster.adapters.store import SqlStore, open_store
from vllm_batch_dagster.core.claims import COMPLETIONS, UPLOADS, Claim, ClaimKey
from vllm_batch_dagster.core.errors import ClaimConflict, InvalidInput, NotFound, StateConflict
from vllm_batch_dagster.core.models import File
from vllm_batch_dagster.core.ports import BatchStore, FileStore
from vllm_batch_dagster.core.uploads import PartTotals, Upload, UploadPart, UploadStatus

NOW = 1_800_000_000
UPLOAD = Upload("upload_1", "wörter.jsonl", "batch", 12, "text/plain", NOW, NOW + 3600, expires_after=7200)
FILE = File("file-1", 12, NOW + 5, "wörter.jsonl", "batch", "ab" * 32, NOW + 7205)


def a_part(number: int, upload_id: str = "upload_1", size: int = 4) -> UploadPart:
    return UploadPart(f"part_{number}", upload_id, size, NOW + number)


@pytest.fixture
def begun(store: BatchStore) -> BatchStore:
    """A store with one pending upload of two parts."""
    store.uploads.add(UPLOAD)
    for number in (2, 1):
        store.uploads.add_part(a_part(number))
    return store


def complete(store: BatchStore, file: File = FILE) -> Upload:
    store.uploads.begin_completion("upload_1", file.id)
    return store.uploads.complete("upload_1", file, ["part_2", "part_1"], "00" * 16)


def test_an_upload_comes_back_as_it_was_added(store: BatchStore) -> None:
    large = replace(UPLOAD, id="upload_2", bytes=8 << 30, expires_after=None, project_id="other")
    store.uploads.add(UPLOAD)
    store.uploads.add(large)

    assert store.uploads.get("upload_1") == UPLOAD
    assert store.uploads.get("upload_2") == large


def test_an_upload_of_another_project_is_not_found(begun: BatchStore) -> None:
    assert begun.uploads.get("upload_1", project_id="default") == UPLOAD
    for upload_id, project_id in (("upload_1", "other"), ("upload_9", None), ("upload_9", "default")):
        with pytest.raises(NotFound) as missing:
            begun.uploads.get(upload_id, project_id=project_id)
        assert (missing.value.kind, missing.value.object_id) == ("upload", upload_id)


def test_parts_are_listed_as_they_came(begun: BatchStore) -> None:
    assert begun.uploads.parts("upload_1") == [a_part(2), a_part(1)]
    assert begun.uploads.held("upload_1") == PartTotals(2, 8)
    assert begun.uploads.parts("upload_9") == []
    assert begun.uploads.held("upload_9") == PartTotals(0, 0)


def test_parts_add_up_beyond_what_a_word_holds(store: BatchStore) -> None:
    store.uploads.add(UPLOAD)
    for number in range(3):
        store.uploads.add_part(a_part(number, size=1 << 62 if number == 0 else 1))
    assert store.uploads.held("upload_1") == PartTotals(3, (1 << 62) + 2)


def test_a_completion_adds_the_file_and_closes_the_upload(begun: BatchStore) -> None:
    assert begun.uploads.begin_completion("upload_1", "file-1") is None
    assert begun.uploads.get("upload_1") == replace(UPLOAD, file_id="file-1")

    done = begun.uploads.complete("upload_1", FILE, ["part_2", "part_1"], "00" * 16)

    assert done == replace(
        UPLOAD, status=UploadStatus.COMPLETED, file_id="file-1", part_ids=("part_2", "part_1"), md5="00" * 16
    )
    assert begun.uploads.get("upload_1") == done
    assert begun.files.get("file-1") == FILE


def test_only_the_newest_attempt_completes(begun: BatchStore) -> None:
    begun.uploads.begin_completion("upload_1", "file-1")
    assert begun.uploads.begin_completion("upload_1", "file-2") == "file-1"

    with pytest.raises(StateConflict):
        begun.uploads.complete("upload_1", FILE, [], "")
    assert begun.uploads.get("upload_1").is_pending
    with pytest.raises(NotFound):
        begun.files.get("file-1")
    begun.uploads.complete("upload_1", replace(FILE, id="file-2"), [], "")


def test_a_file_whose_id_is_taken_completes_nothing(begun: BatchStore) -> None:
    begun.files.add(FILE)
    with pytest.raises(StateConflict):
        complete(begun)
    assert begun.uploads.get("upload_1").is_pending


CALLS: list[Callable[[BatchStore], object]] = [
    lambda store: store.uploads.add_part(a_part(9)),
    lambda store: store.uploads.begin_completion("upload_1", "file-9"),
    lambda store: store.uploads.complete("upload_1", FILE, [], ""),
    lambda store: store.uploads.close("upload_1", UploadStatus.CANCELLED),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("status", [UploadStatus.COMPLETED, UploadStatus.CANCELLED, UploadStatus.EXPIRED])
def test_a_closed_upload_stays_as_it_is(
    begun: BatchStore, status: UploadStatus, call: Callable[[BatchStore], object]
) -> None:
    closed = complete(begun) if status is UploadStatus.COMPLETED else begun.uploads.close("upload_1", status)
    assert closed.status is status

    with pytest.raises(StateConflict):
        call(begun)
    assert begun.uploads.get("upload_1") == closed
    assert begun.uploads.held("upload_1").count == 2


@pytest.mark.parametrize("call", CALLS)
def test_an_unknown_upload_is_not_found(store: BatchStore, call: Callable[[BatchStore], object]) -> None:
    with pytest.raises(NotFound):
        call(store)


def test_what_is_dropped_is_gone(begun: BatchStore) -> None:
    begun.uploads.add(replace(UPLOAD, id="upload_2"))
    begun.uploads.add_part(a_part(3, "upload_2"))

    begun.uploads.drop_parts("upload_1")
    assert begun.uploads.parts("upload_1") == []
    begun.uploads.delete("upload_2")
    assert begun.uploads.parts("upload_2") == []
    with pytest.raises(NotFound):
        begun.uploads.get("upload_2")
    begun.uploads.drop_parts("upload_9")
    begun.uploads.delete("upload_9")
    assert begun.uploads.get("upload_1") == UPLOAD


def test_stale_are_those_that_somebody_must_clean_up(store: BatchStore) -> None:
    for number, created_at in enumerate((30, 10, 20, 40, 25, 5)):
        store.uploads.add(replace(UPLOAD, id=f"upload_{number}", created_at=created_at, expires_at=created_at + 10))
    store.uploads.add_part(a_part(1, "upload_2"))
    store.uploads.close("upload_2", UploadStatus.CANCELLED)  # has a part
    store.uploads.close("upload_4", UploadStatus.CANCELLED)  # has none
    store.uploads.close("upload_5", UploadStatus.EXPIRED)  # has none, and is old

    def stale(now: int, forget_before: int, limit: int = 9) -> list[str]:
        return [upload.id for upload in store.uploads.stale(now, forget_before, limit)]

    assert stale(20, 0) == ["upload_1", "upload_2"]
    assert stale(19, 6) == ["upload_5", "upload_2"]
    assert stale(40, 26) == ["upload_5", "upload_1", "upload_2", "upload_4", "upload_0"]
    assert stale(40, 26, limit=2) == ["upload_5", "upload_1"]


def test_threads_that_end_an_upload_at_once_agree(sql_url: str) -> None:
    store = open_store(sql_url)
    store.uploads.add(UPLOAD)
    store.uploads.begin_completion("upload_1", "file-1")
    won, start = [], threading.Barrier(8)

    def end(number: int) -> None:
        start.wait()
        try:
            if number % 2:
                store.uploads.close("upload_1", UploadStatus.CANCELLED)
            else:
                store.uploads.complete("upload_1", FILE, [], "")
        except StateConflict:
            return
        won.append(number)

    threads = [threading.Thread(target=end, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(won) == 1
    assert store.uploads.get("upload_1").status is (UploadStatus.CANCELLED if won[0] % 2 else UploadStatus.COMPLETED)
    assert len(store.files.list().data) == 1 - won[0] % 2
    store.close()


def test_a_part_and_the_end_of_its_upload_do_not_cross(sql_store: SqlStore) -> None:
    """Each part is either in before the end, or refused: none is added behind it."""
    sql_store.uploads.add(UPLOAD)
    added: list[int] = []
    seen: list[int] = []
    well_begun = threading.Event()

    def add_parts() -> None:
        for number in range(200):
            try:
                sql_store.uploads.add_part(a_part(number))
            except StateConflict:
                return
            added.append(number)
            if number == 5:
                well_begun.set()
        pytest.fail("the upload never ended")

    def end() -> None:
        well_begun.wait()
        sql_store.uploads.close("upload_1", UploadStatus.CANCELLED)
        seen.append(sql_store.uploads.held("upload_1").count)

    threads = [threading.Thread(target=add_parts), threading.Thread(target=end)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [len(added)] == [sql_store.uploads.held("upload_1").count]


class TestPartContents:
    @pytest.fixture(params=["memory", "local"])
    def files(self, request: pytest.FixtureRequest, tmp_path: Path) -> FileStore:
        return MemoryFiles() if request.param == "memory" else LocalFiles(tmp_path / "files")

    def put(self, files: FileStore, upload_id: str, part_id: str, data: bytes) -> None:
        arriving = files.parts.create(upload_id, part_id)
        arriving.write(data)
        arriving.commit()

    def test_a_part_is_there_from_its_commit_on(self, files: FileStore) -> None:
        arriving = files.parts.create("upload_1", "part_1")
        arriving.write(b"contents")
        with pytest.raises(NotFound):
            files.parts.open("upload_1", "part_1")
        arriving.commit()
        with files.parts.open("upload_1", "part_1") as reader:
            assert reader.read() == b"contents"

    def test_no_file_id_leads_to_a_part(self, files: FileStore) -> None:
        self.put(files, "upload_1", "part_1", b"x")
        for file_id in ("part_1", "upload_1", "upload_1.part_1", ".parts/upload_1.part_1"):
            with pytest.raises(NotFound):
                files.open(file_id)

    def test_the_parts_of_one_upload_are_deleted_together(self, files: FileStore) -> None:
        for upload_id in ("upload_1", "upload_12"):
            for part_id in ("part_1", "part_2"):
                self.put(files, upload_id, part_id, b"x")

        files.parts.delete("upload_1")
        files.parts.delete("upload_1")
        for part_id in ("part_1", "part_2"):
            with pytest.raises(NotFound) as missing:
                files.parts.open("upload_1", part_id)
            assert missing.value.kind == "part"
            files.parts.open("upload_12", part_id).close()

    @pytest.mark.parametrize("bad", ["", "..", "../x", "a.b", "*", "a/b", "\0"])
    def test_an_id_that_is_no_file_name_goes_nowhere(self, files: FileStore, bad: str) -> None:
        self.put(files, "upload_1", "part_1", b"x")
        for ids in ((bad, "part_1"), ("upload_1", bad)):
            with pytest.raises(InvalidInput):
                files.parts.create(*ids)
            with pytest.raises(NotFound):
                files.parts.open(*ids)
        files.parts.delete(bad)
        files.parts.open("upload_1", "part_1").close()


def test_the_parts_of_a_project_take_room_until_they_are_dropped(begun: BatchStore) -> None:
    begun.uploads.add(replace(UPLOAD, id="upload_2", project_id="other"))
    begun.uploads.add_part(a_part(3, "upload_2", size=5))
    assert [begun.uploads.stored_bytes(project) for project in ("default", "other", "none")] == [8, 5, 0]
    complete(begun)
    assert begun.uploads.stored_bytes("default") == 8
    begun.uploads.drop_parts("upload_1")
    assert begun.uploads.stored_bytes("default") == 0


def test_the_second_call_of_a_claim_gets_the_first_upload(store: BatchStore) -> None:
    claim = Claim(ClaimKey("default", UPLOADS, "k"), "f1")
    assert store.uploads.add(UPLOAD, claim=claim) == "upload_1"
    assert store.uploads.add(replace(UPLOAD, id="upload_2"), claim=claim) == "upload_1"
    with pytest.raises(NotFound):
        store.uploads.get("upload_2")
    with pytest.raises(ClaimConflict):
        store.uploads.add(replace(UPLOAD, id="upload_2"), claim=replace(claim, fingerprint="f2"))
    store.uploads.delete("upload_1")
    assert store.uploads.add(replace(UPLOAD, id="upload_2"), claim=claim) == "upload_2"


def test_a_completion_keeps_its_claim_or_does_nothing(begun: BatchStore) -> None:
    claim = Claim(ClaimKey("default", COMPLETIONS, "k"), "f1")
    begun.uploads.add(replace(UPLOAD, id="upload_2"))
    begun.uploads.begin_completion("upload_2", "file-2")
    begun.uploads.complete("upload_2", replace(FILE, id="file-2"), (), "00", claim=claim)
    begun.uploads.begin_completion("upload_1", FILE.id)
    with pytest.raises(ClaimConflict):
        begun.uploads.complete("upload_1", FILE, (), "00", claim=claim)
    assert begun.uploads.get("upload_1").is_pending
    assert [file.id for file in begun.files.list().data] == ["file-2"]
    assert begun.idempotency.find(claim, NOW) == "upload_2"
