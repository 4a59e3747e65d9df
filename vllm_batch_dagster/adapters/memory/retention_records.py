"""The in-memory store as retention sees it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from vllm_batch_dagster.adapters.memory.idempotency_records import release_claims
from vllm_batch_dagster.adapters.memory.tables import Tables
from vllm_batch_dagster.core.deliveries import DeliveryState
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.models import Batch, File
from vllm_batch_dagster.core.pauses import PauseCause
from vllm_batch_dagster.core.retention import ended_at


class MemoryRetentionRecords:
    """See RetentionRecords."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def files(self, *, after: str = "", limit: int, expired_by: int | None = None) -> Sequence[File]:
        with self._tables.lock:
            found = sorted(self._tables.files.values(), key=lambda file: file.id)
        if expired_by is not None:
            found = [file for file in found if file.expires_at is not None and file.expires_at <= expired_by]
        return [file for file in found if file.id > after][:limit]

    def expiries(self, file_ids: Collection[str]) -> Mapping[str, int | None]:
        with self._tables.lock:
            known = self._tables.files
            return {file_id: known[file_id].expires_at for file_id in file_ids if file_id in known}

    def ended(self, *, after: str = "", limit: int, by: int, purged: bool) -> Sequence[Batch]:
        with self._tables.lock:
            found = sorted(self._tables.batches.values(), key=lambda batch: batch.id)
        return [
            batch
            for batch in found
            if batch.id > after
            and (batch.purged_at is not None) == purged
            and not batch.is_stale
            and not self._is_on_its_way(batch.id)
            and (end := ended_at(batch)) is not None
            and end <= by
        ][:limit]

    def purge(self, batch_id: str, now: int) -> None:
        with self._tables.lock:
            batch = self._find_ended(batch_id)
            for table in (self._tables.chunks, self._tables.attempts):
                for key in [key for key in table if key[0] == batch_id]:
                    del table[key]
            for cause in PauseCause:
                self._tables.pauses.pop((batch_id, cause), None)
            if batch.purged_at is None:
                self._tables.batches[batch_id] = replace(batch, purged_at=now)

    def forget(self, batch_id: str) -> None:
        with self._tables.lock:
            if self._find_ended(batch_id).purged_at is None:
                raise StateConflict(f"{batch_id} still has its working data: purge it first")
            kept = {key: row for key, row in self._tables.deliveries.items() if row.batch_id != batch_id}
            self._tables.deliveries = kept
            self._tables.events[:] = [event for event in self._tables.events if event.batch_id != batch_id]
            release_claims(self._tables, batch_id)
            del self._tables.batches[batch_id]

    def _is_on_its_way(self, batch_id: str) -> bool:
        rows = (row for row in self._tables.deliveries.values() if row.batch_id == batch_id)
        return any(row.state is DeliveryState.PENDING for row in rows)

    def _find_ended(self, batch_id: str) -> Batch:
        batch = self._tables.batches.get(batch_id)
        if batch is None:
            raise NotFound("batch", batch_id)
        if batch.is_stale or not batch.is_terminal:
            raise StateConflict(f"{batch_id} is {batch.status.value} and in use: it cannot be purged")
        if self._is_on_its_way(batch_id):
            raise StateConflict(f"{batch_id} has deliveries that are still tried: it cannot be purged")
        return batch
