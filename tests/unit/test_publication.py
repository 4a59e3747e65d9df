"""Publishing a file: whole and durable when the block ends, without a trace when it does not."""

import errno
import os
from pathlib import Path

import pytest

from vllm_batch_dagster.core.errors import StorageFailure
from vllm_batch_dagster.stages.publication import make_folder, publish, sync_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_then_raise(path: Path, error: BaseException) -> None:
    with publish(path) as file:
        file.write(b"new")
        raise error


def test_the_file_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "index.bin"
    with publish(path) as file:
        file.write(b"0000body")
        file.seek(0)
        file.write(b"HEAD")
        assert not path.exists()
    assert path.read_bytes() == b"HEADbody"
    assert names(tmp_path) == ["index.bin"]


def test_a_published_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "index.bin"
    path.write_bytes(b"old")
    with publish(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError("bad line"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_an_error_leaves_what_was_there_before(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "index.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        write_then_raise(path, error)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["index.bin"]


def test_the_disks_refusal_in_the_block_is_a_storage_failure(tmp_path: Path) -> None:
    path = tmp_path / "index.bin"
    with pytest.raises(StorageFailure, match=r"index\.bin could not be written: No space left.*free space"):
        write_then_raise(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert names(tmp_path) == []


def test_another_os_error_of_the_block_is_the_callers_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), publish(tmp_path / "index.bin"):
        (tmp_path / "input").read_bytes()
    assert names(tmp_path) == []


def test_a_missing_folder_is_a_storage_failure(tmp_path: Path) -> None:
    with pytest.raises(StorageFailure, match=r"none/index\.bin could not be written"):
        write_then_raise(tmp_path / "none" / "index.bin", AssertionError("the block must not run"))


def test_a_failed_fsync_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageFailure, match="Input/output error"), publish(tmp_path / "index.bin") as file:
        file.write(b"new")
    assert names(tmp_path) == []


def test_two_publishers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "index.bin"
    with publish(path) as first:
        first.write(b"first, longer")
        with publish(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first, longer"


def test_folders_are_made_with_their_parents(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "c"
    assert make_folder(folder) == folder
    assert make_folder(folder).is_dir()


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(StorageFailure, match="/a could not be written: File exists"):
        make_folder(tmp_path / "a" / "b")


def test_syncing_what_is_not_there_is_a_storage_failure(tmp_path: Path) -> None:
    with pytest.raises(StorageFailure, match="none"):
        sync_folder(tmp_path / "none")
