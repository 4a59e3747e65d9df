"""The one way in which a file becomes visible: written beside its place, fsynced, renamed, folder fsynced.

Called by the stages for indexes and results, and by the local file store. What is not yet published is a file that
nobody looks for, so a process may die at any point.
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vllm_batch_dagster.core.errors import StorageFailure

# The disk's own refusals: what a caller's write may raise without being a fault of the caller.
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
_BUFFER_BYTES = 1 << 20


class Draft:
    """A file that is being written at `temporary` and belongs at `target`, on the same file system.

    Raises StorageFailure when the disk refuses, at creation and at `commit`; `file` raises OSError as files do.
    """

    def __init__(self, target: Path, temporary: Path) -> None:
        self._target, self._temporary = target, temporary
        try:
            self.file: BinaryIO = temporary.open("xb", buffering=_BUFFER_BYTES)
        except OSError as error:
            raise unwritable(target, error) from error

    def commit(self) -> None:
        """Make the contents durable, then visible. On an error the draft is gone."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self._temporary.replace(self._target)
        except OSError as error:
            self.discard()
            raise unwritable(self._target, error) from error
        sync_folder(self._target.parent)

    def discard(self) -> None:
        """Remove what was written. Harmless after `commit`."""
        with suppress(OSError):
            self.file.close()  # flushes what is buffered, and on a full disk that fails
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path` when the block ends, and leaves no trace when it raises.

    The folder must exist. Raises StorageFailure when the disk refuses.
    """
    draft = Draft(path, path.with_name(f".{path.name}.{secrets.token_hex(8)}"))
    try:
        yield draft.file
        draft.commit()
    except BaseException as error:
        draft.discard()
        if is_disk_error(error):
            raise unwritable(path, error) from error
        raise


def is_disk_error(error: BaseException) -> bool:
    """True for an OSError by which the disk refuses bytes: full, over quota, read-only, broken."""
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


def unwritable(path: Path, error: BaseException) -> StorageFailure:
    """Return the StorageFailure for an OSError that came from writing `path`."""
    reason = getattr(error, "strerror", None) or str(error)
    return StorageFailure(
        f"{path} could not be written: {reason}. Check the free space and the permissions of {path.parent}, "
        "then try again."
    )


def sync_folder(path: Path) -> None:
    """Make the names in the folder `path` durable (or the contents, when it is a file). Raises StorageFailure."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unwritable(path, error) from error


def make_folder(path: Path) -> Path:
    """Create the folder `path` and its parents durably, and return it. Raises StorageFailure."""
    if path.is_dir():
        return path
    make_folder(path.parent)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    sync_folder(path.parent)
    return path
