"""What every file store does with contents, in memory and on local disk, and what only the local folders do."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_batch_dagster.adapters.local_files import LocalFiles, LocalWorkspace
from vllm_batch_dagster.adapters.memory import MemoryFiles
from vllm_batch_dagster.core.errors import InvalidInput, NotFound, StorageFailure
from vllm_batch_dagster.core.ports import FileStore

ROOT = Path(__file__).parents[2]
BAD_IDS = ["", ".", "..", "../file-1", "a/b", "/etc/passwd", "file-1\n", "file 1", "fil\0", "ü", ".tmp", "x" * 201]


@pytest.fixture(params=["memory", "local"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> FileStore:
    return MemoryFiles() if request.param == "memory" else LocalFiles(tmp_path / "home" / "files")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "files"


def store_bytes(files: FileStore, file_id: str, *blocks: bytes) -> tuple[int, str]:
    arriving = files.create(file_id)
    for block in blocks:
        arriving.write(block)
    return arriving.commit()


def read_bytes(files: FileStore, file_id: str) -> bytes:
    with files.open(file_id) as reader:
        return reader.read()


def all_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class TestFileStore:
    def test_contents_come_back_with_size_and_digest(self, files: FileStore) -> None:
        blocks = [b"one\n", b"", os.urandom(3 << 20), b"\0\xff"]
        whole = b"".join(blocks)
        assert store_bytes(files, "file-1", *blocks) == (len(whole), hashlib.sha256(whole).hexdigest())
        assert read_bytes(files, "file-1") == whole

    def test_an_empty_file_is_a_file(self, files: FileStore) -> None:
        assert store_bytes(files, "file-1") == (0, hashlib.sha256(b"").hexdigest())
        assert read_bytes(files, "file-1") == b""

    def test_readers_can_seek(self, files: FileStore) -> None:
        store_bytes(files, "file-1", b"0123456789")
        with files.open("file-1") as reader:
            reader.seek(7)
            assert reader.read(2) == b"78"
            reader.seek(-1, os.SEEK_END)
            assert reader.read() == b"9"

    def test_nothing_is_visible_before_commit(self, files: FileStore) -> None:
        arriving = files.create("file-1")
        arriving.write(b"half")
        with pytest.raises(NotFound):
            files.open("file-1")
        arriving.commit()
        assert read_bytes(files, "file-1") == b"half"

    def test_a_discarded_file_never_was(self, files: FileStore) -> None:
        arriving = files.create("file-1")
        arriving.write(b"half")
        arriving.discard()
        arriving.discard()
        with pytest.raises(NotFound):
            files.open("file-1")

    def test_discard_after_commit_is_harmless(self, files: FileStore) -> None:
        arriving = files.create("file-1")
        arriving.write(b"whole")
        arriving.commit()
        arriving.discard()
        assert read_bytes(files, "file-1") == b"whole"

    def test_two_writers_of_one_id_do_not_mix(self, files: FileStore) -> None:
        first, second = files.create("file-1"), files.create("file-1")
        first.write(b"first")
        second.write(b"second, longer")
        second.commit()
        first.commit()
        assert read_bytes(files, "file-1") == b"first"

    def test_a_deleted_file_is_gone_and_deleting_is_harmless(self, files: FileStore) -> None:
        store_bytes(files, "file-1", b"x")
        with files.open("file-1") as reader:
            files.delete("file-1")
            assert reader.read() == b"x"  # a download that has begun goes on
        with pytest.raises(NotFound) as missing:
            files.open("file-1")
        assert (missing.value.kind, missing.value.object_id) == ("file", "file-1")
        files.delete("file-1")

    @pytest.mark.parametrize("bad", BAD_IDS)
    def test_an_id_that_is_no_file_name_goes_nowhere(self, files: FileStore, bad: str) -> None:
        with pytest.raises(InvalidInput):
            files.create(bad)
        with pytest.raises(NotFound):
            files.open(bad)
        files.delete(bad)


class TestLocalFiles:
    def test_a_file_lies_under_its_id_and_nothing_else_is_left(self, folder: Path) -> None:
        store_bytes(LocalFiles(folder), "file-1", b"x")
        arriving = LocalFiles(folder).create("file-2")
        arriving.write(b"half")
        arriving.discard()
        assert all_files(folder) == [folder / "file-1"]

    def test_a_sweep_removes_what_a_killed_process_left(self, folder: Path) -> None:
        store_bytes(LocalFiles(folder), "file-1", b"x")
        LocalFiles(folder).create("file-2").write(b"half")
        assert LocalFiles(folder).sweep() == 1
        assert all_files(folder) == [folder / "file-1"]
        assert LocalFiles(folder / "none").sweep() == 0

    def test_blocks_are_not_held_in_memory(self, folder: Path) -> None:
        """After 64 blocks of 1 MiB, all but the last is on disk already."""
        arriving = LocalFiles(folder).create("file-1")
        block = bytes(1 << 20)
        for _ in range(64):
            arriving.write(block)
        (draft,) = all_files(folder)
        assert draft.stat().st_size >= 63 << 20
        arriving.discard()

    def test_a_full_disk_is_a_storage_failure_that_leaves_nothing(self, folder: Path) -> None:
        with small_disk(1 << 20):
            arriving = LocalFiles(folder).create("file-1")
            with pytest.raises(StorageFailure, match=r"file-1 could not be written: File too large.*free space"):
                arriving.write(bytes(4 << 20))
        arriving.discard()
        assert all_files(folder) == []

    def test_a_disk_that_fills_at_commit_leaves_nothing(self, folder: Path) -> None:
        with small_disk(1000):
            arriving = LocalFiles(folder).create("file-1")
            arriving.write(bytes(5000))  # stays in the buffer
            with pytest.raises(StorageFailure, match="file-1 could not be written"):
                arriving.commit()
        assert all_files(folder) == []

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "home").write_text("a file where the folder should be")
        with pytest.raises(StorageFailure, match="home"):
            LocalFiles(tmp_path / "home" / "files").create("file-1")

    def test_what_cannot_be_read_or_removed_is_a_storage_failure(self, folder: Path) -> None:
        link = folder / "file-1"
        folder.mkdir()
        link.symlink_to(link)  # a loop: ELOOP for everybody, root included
        with pytest.raises(StorageFailure, match="file-1 cannot be read"):
            LocalFiles(folder).open("file-1")
        (folder / "file-2").mkdir()
        with pytest.raises(StorageFailure, match="file-2 cannot be removed"):
            LocalFiles(folder).delete("file-2")

    def test_contents_are_synced_before_the_rename_and_the_folder_after(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arriving = LocalFiles(folder).create("file-1")
        arriving.write(b"x")
        steps = record_steps(monkeypatch)
        arriving.commit()
        assert steps == [("fsync", "draft of 1 byte"), ("rename", "file-1"), ("fsync", "files")]

    def test_a_killed_writer_leaves_nothing_visible(self, folder: Path) -> None:
        script = (
            "import sys, time; from pathlib import Path\n"
            "from vllm_batch_dagster.adapters.local_files import LocalFiles\n"
            "arriving = LocalFiles(Path(sys.argv[1])).create('file-1'); arriving.write(bytes(5 << 20))\n"
            "print('written', flush=True); time.sleep(600)\n"
        )
        command = [sys.executable, "-c", script, str(folder)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"written\n"
            process.kill()
        with pytest.raises(NotFound):
            LocalFiles(folder).open("file-1")
        assert store_bytes(LocalFiles(folder), "file-1", b"again")[0] == 5


class small_disk:
    """Files of this process cannot grow past `size` bytes: the kernel's own error, without filling a disk."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __enter__(self) -> None:
        self._handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, self._limits[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)
        signal.signal(signal.SIGXFSZ, self._handler)


def record_steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Let fsync and rename work as ever, and note their order."""
    steps: list[tuple[str, str]] = []
    fsync: Callable[[int], None] = os.fsync
    rename = Path.replace

    def noting_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        steps.append(("fsync", path.name if path.is_dir() else f"draft of {path.stat().st_size} byte"))
        fsync(descriptor)

    def noting_rename(self: Path, target: Path) -> Path:
        steps.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_rename)
    return steps


class TestLocalWorkspace:
    @pytest.fixture
    def workspace(self, tmp_path: Path) -> LocalWorkspace:
        return LocalWorkspace(tmp_path / "batches", tmp_path / "datasets")

    def test_every_path_is_where_the_map_says(self, workspace: LocalWorkspace, tmp_path: Path) -> None:
        batch = tmp_path / "batches" / "batch_1"
        assert workspace.index_path("batch_1") == batch / "index.bin"
        assert workspace.journal_path("batch_1", 7, 12) == batch / "journal" / "0007" / "000012.jsonl"
        assert workspace.result_path("batch_1", 7, 12) == batch / "results" / "0007.000012.idx"
        assert workspace.dataset_path("curated", "batch_1") == tmp_path / "datasets" / "curated" / "batch=batch_1"

    def test_folders_are_made_and_files_are_not(self, workspace: LocalWorkspace, tmp_path: Path) -> None:
        paths = [
            workspace.index_path("batch_1"),
            workspace.journal_path("batch_1", 0, 1),
            workspace.result_path("batch_1", 0, 1),
            workspace.dataset_path("curated", "batch_1"),
        ]
        assert all(path.parent.is_dir() and not path.exists() for path in paths)
        assert all_files(tmp_path) == []

    @pytest.mark.parametrize("bad", BAD_IDS)
    def test_an_id_that_is_no_file_name_makes_nothing(
        self, workspace: LocalWorkspace, tmp_path: Path, bad: str
    ) -> None:
        calls: Iterator[Callable[[], Path]] = iter(
            [
                lambda: workspace.index_path(bad),
                lambda: workspace.journal_path(bad, 0, 1),
                lambda: workspace.result_path(bad, 0, 1),
                lambda: workspace.dataset_path("curated", bad),
                lambda: workspace.dataset_path(bad, "batch_1"),
            ]
        )
        for call in calls:
            with pytest.raises(InvalidInput):
                call()
        assert not (tmp_path / "batches").exists()

    def test_threads_may_make_the_same_folders_at_once(self, workspace: LocalWorkspace) -> None:
        start, made = threading.Barrier(8), []

        def make() -> None:
            start.wait()
            made.append(workspace.journal_path("batch_1", 3, 1).parent.is_dir())

        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert made == [True] * 8
