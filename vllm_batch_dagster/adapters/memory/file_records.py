"""The file table in memory."""

from collections.abc import Sequence

from vllm_batch_dagster.adapters.memory.idempotency_records import find_owner, keep_claim, release_claims
from vllm_batch_dagster.adapters.memory.tables import Tables, by_time, take_page, within
from vllm_batch_dagster.core.claims import Claim
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.models import File, Page


class MemoryFileRecords:
    """See FileRecords."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def add(self, file: File, *, claim: Claim | None = None) -> str:
        """Raises StateConflict when the id is taken."""
        with self._tables.lock:
            owner = find_owner(self._tables, claim, file.id, file.created_at)
            if owner == file.id:
                insert_files(self._tables, (file,))
                keep_claim(self._tables, claim, file.id, file.created_at)
            return owner

    def get(self, file_id: str, *, project_id: str | None = None) -> File:
        with self._tables.lock:
            file = self._tables.files.get(file_id)
        if file is None or project_id not in (None, file.project_id):
            raise NotFound("file", file_id)
        return file

    def list(
        self,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: str = "desc",
        project_id: str | None = None,
    ) -> Page[File]:
        with self._tables.lock:
            ordered = by_time(within(self._tables.files.values(), project_id), descending=order != "asc")
        shown = [file for file in ordered if purpose in (None, file.purpose)]
        return take_page(ordered, shown, kind="file", after=after, limit=limit)

    def delete(self, file_id: str) -> None:
        with self._tables.lock:
            if self._tables.files.pop(file_id, None) is None:
                raise NotFound("file", file_id)
            release_claims(self._tables, file_id)

    def stored_bytes(self, project_id: str, now: float) -> int:
        with self._tables.lock:
            mine = within(self._tables.files.values(), project_id)
            return sum(file.bytes for file in mine if file.expires_at is None or file.expires_at > now)


def insert_files(tables: Tables, new: Sequence[File]) -> None:
    """Add all records or none. Raises StateConflict when an id is taken."""
    ids = [file.id for file in new]
    if len(set(ids)) < len(ids) or not tables.files.keys().isdisjoint(ids):
        raise StateConflict(f"a file with this id exists already: {', '.join(ids)}")
    tables.files.update({file.id: file for file in new})
