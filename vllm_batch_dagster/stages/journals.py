"""Journals of a chunk on disk: append with group commit while it runs, replay when it resumes or is sealed.

An answer counts only after `write` returned: fsync first, acknowledge second (design section 3).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from vllm_batch_dagster.core.errors import CorruptJournal, StorageFailure
from vllm_batch_dagster.core.journal import JournalRecord, PlacedRecord, read_placed, read_records
from vllm_batch_dagster.core.ports import Workspace
from vllm_batch_dagster.core.results import ResultEntry
from vllm_batch_dagster.stages.publication import sync_folder, unwritable


class JournalWriter:
    """The journal of one attempt, a new file. Each `write` is one group commit. Raises StorageFailure."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except OSError as error:
            raise unwritable(path, error) from error
        self._refusal = ""
        try:
            sync_folder(path.parent)
        except StorageFailure:
            os.close(self._descriptor)
            raise

    def write(self, records: Sequence[bytes]) -> None:
        """Append encoded records and fsync. When it returns, they are durable.

        Raises StorageFailure (disk full, input/output error); none of these records counts then, and the journal
        takes no more: what stands behind half a record could not be read back.
        """
        if self._refusal:
            raise StorageFailure(self._refusal)
        try:
            _write_all(self._descriptor, b"".join(records))
            os.fdatasync(self._descriptor)
        except OSError as error:
            self._refusal = f"the journal could not be written: {error.strerror}; free space, then run the chunk again"
            raise StorageFailure(self._refusal) from error

    def close(self) -> None:
        os.close(self._descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def replay(
    workspace: Workspace,
    batch_id: str,
    chunk: int,
    base_epoch: int,
    epoch: int,
    *,
    fence: Mapping[int, int] | None = None,
) -> Iterator[tuple[int, PlacedRecord]]:
    """Yield (epoch, record) from the journals of epochs `base_epoch`..`epoch`, oldest first. A line may come twice.

    `fence` says where the journals of the epochs before `epoch` end: at byte `fence[n]`, and one it does not name is
    empty. Whoever still appends to an older journal, because it was taken for dead, stays out.
    """
    for number in range(base_epoch, epoch + 1):
        path = workspace.journal_path(batch_id, chunk, number)
        end = None if fence is None or number == epoch else fence.get(number, 0)
        if end != 0 and path.exists():
            with path.open("rb") as journal:
                yield from ((number, placed) for placed in _until(end, read_records(journal)))


def _until(end: int | None, records: Iterator[PlacedRecord]) -> Iterator[PlacedRecord]:
    return records if end is None else takewhile(lambda placed: placed.end <= end, records)


class JournalReader:
    """Reads single answers of one chunk by their place. Journals are opened once and closed together."""

    def __init__(self, workspace: Workspace, batch_id: str, chunk: int) -> None:
        self._workspace, self._batch_id, self._chunk = workspace, batch_id, chunk
        self._stack = ExitStack()
        self._open: dict[int, BinaryIO] = {}

    def __enter__(self) -> "JournalReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, entry: ResultEntry) -> JournalRecord:
        """Return the record at `entry`. Raises CorruptJournal."""
        if entry.epoch not in self._open:
            path = self._workspace.journal_path(self._batch_id, self._chunk, entry.epoch)
            try:
                self._open[entry.epoch] = self._stack.enter_context(path.open("rb"))
            except OSError as error:
                raise CorruptJournal(f"{path} cannot be read: {error.strerror}; run the chunk again") from error
        return read_placed(self._open[entry.epoch], entry.offset, entry.length)
