"""What lies in the state folder, for retention. The folders are those that local_files.py writes."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vllm_batch_dagster.core.errors import StorageFailure
from vllm_batch_dagster.core.retention_ports import StoredItem

_FILE_PREFIX = "file-"  # of every file id; whatever else lies there is not ours to judge
_UNFINISHED_SUFFIX = ".new"  # a data set that is being written (stages/curation.py)


class LocalDisk:
    """See Disk."""

    def __init__(self, files_folder: Path, batches_folder: Path, datasets_folder: Path) -> None:
        self._files, self._batches, self._datasets = files_folder, batches_folder, datasets_folder

    def contents(self) -> Iterator[StoredItem]:
        return (item for item in _items(self._files, folders=False) if item.name.startswith(_FILE_PREFIX))

    def drafts(self) -> Iterator[StoredItem]:
        yield from _items(self._files / ".tmp", folders=False)
        yield from (item for item in self._dataset_folders() if item.name.endswith(_UNFINISHED_SUFFIX))

    def batches(self) -> Iterator[StoredItem]:
        return _items(self._batches, folders=True)

    def datasets(self) -> Iterator[StoredItem]:
        return (item for item in self._dataset_folders() if not item.name.endswith(_UNFINISHED_SUFFIX))

    def batch(self, batch_id: str) -> StoredItem | None:
        path = self._batches / batch_id
        # An id with a slash in it is no folder of ours.
        return _item(path) if path.parent == self._batches and path.is_dir() else None

    def has_contents(self, file_id: str) -> bool:
        return (self._files / file_id).is_file()

    def size(self, item: StoredItem) -> int:
        if not item.path.is_dir():
            return _length(item.path)
        return sum(_length(Path(folder, name)) for folder, _, names in os.walk(item.path) for name in names)

    def remove(self, item: StoredItem) -> None:
        try:
            if item.path.is_dir() and not item.path.is_symlink():
                shutil.rmtree(item.path)
            else:
                item.path.unlink(missing_ok=True)
        except FileNotFoundError:
            return  # somebody else was faster
        except OSError as error:
            raise StorageFailure(f"{item.path} cannot be removed: {error.strerror}.") from error

    def _dataset_folders(self) -> Iterator[StoredItem]:
        for dataset in _items(self._datasets, folders=True):
            yield from _items(dataset.path, folders=True)


def _items(folder: Path, *, folders: bool) -> Iterator[StoredItem]:
    """Yield the files or the folders in `folder`, one at a time; nothing when there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) == folders and (item := _item(Path(entry.path))):
                    yield item
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageFailure(f"{folder} cannot be read: {error.strerror}.") from error


def _item(path: Path) -> StoredItem | None:
    try:
        return StoredItem(path.name, path, path.lstat().st_mtime)
    except FileNotFoundError:
        return None


def _length(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
