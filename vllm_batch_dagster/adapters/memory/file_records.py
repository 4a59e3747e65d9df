"""The file table in memory."""

from collections.abc import Sequence

from vllm_batch_dagster.adapters.memory.tables import Tables, by_time, take_page
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.models import File, Page


class MemoryFileRecords:
    """See FileRecords."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def add(self, file: File) -> None:
        """Raises StateConflict when the id is taken."""
        with self._tables.lock:
            insert_files(self._tables, (file,))

    def get(self, file_id: str) -> File:
        with self._tables.lock:
            try:
                return self._tables.files[file_id]
            except KeyError:
                raise NotFound("file", file_id) from None

    def list(
        self, *, purpose: str | None = None, after: str | None = None, limit: int = 10_000, order: str = "desc"
    ) -> Page[File]:
        with self._tables.lock:
            ordered = by_time(self._tables.files.values(), descending=order != "asc")
        shown = [file for file in ordered if purpose in (None, file.purpose)]
        return take_page(ordered, shown, kind="file", after=after, limit=limit)

    def delete(self, file_id: str) -> None:
        with self._tables.lock:
            if self._tables.files.pop(file_id, None) is None:
                raise NotFound("file", file_id)


def insert_files(tables: Tables, new: Sequence[File]) -> None:
    """Add all records or none. Raises StateConflict when an id is taken."""
    ids = [file.id for file in new]
    if len(set(ids)) < len(ids) or not tables.files.keys().isdisjoint(ids):
        raise StateConflict(f"a file with this id exists already: {', '.join(ids)}")
    tables.files.update({file.id: file for file in new})
