"""The batch table and the outbox in memory."""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm_batch_dagster.adapters.memory.file_records import insert_files
from vllm_batch_dagster.adapters.memory.idempotency_records import find_owner, keep_claim
from vllm_batch_dagster.adapters.memory.tables import Tables, by_time, take_page, within
from vllm_batch_dagster.adapters.store.rules import apply_event, check_changes, event_type
from vllm_batch_dagster.core.claims import Claim
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.models import Batch, File, Page, RequestCounts, Usage
from vllm_batch_dagster.core.ports import OutboxEvent
from vllm_batch_dagster.core.states import TIMESTAMP_FIELD, BatchEvent


class MemoryBatchRecords:
    """See BatchRecords."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def add(self, batch: Batch, *, claim: Claim | None = None) -> str:
        """Raises StateConflict when the id is taken."""
        with self._tables.lock:
            owner = find_owner(self._tables, claim, batch.id, batch.created_at)
            if owner == batch.id:
                if batch.id in self._tables.batches:
                    raise StateConflict(f"a batch with this id exists already: {batch.id}")
                self._tables.batches[batch.id] = batch
                keep_claim(self._tables, claim, batch.id, batch.created_at)
            return owner

    def get(self, batch_id: str, *, project_id: str | None = None) -> Batch:
        with self._tables.lock:
            batch = self._show(self._find(batch_id))
        if project_id not in (None, batch.project_id):
            raise NotFound("batch", batch_id)
        return batch

    def list(self, *, after: str | None = None, limit: int = 20, project_id: str | None = None) -> Page[Batch]:
        with self._tables.lock:
            batches = within(self._tables.batches.values(), project_id)
            ordered = by_time(map(self._show, batches), descending=True)
        return take_page(ordered, ordered, kind="batch", after=after, limit=limit)

    def open(self) -> Sequence[Batch]:
        with self._tables.lock:
            ordered = by_time(map(self._show, self._tables.batches.values()))
        return tuple(batch for batch in ordered if batch.is_stale or not batch.is_terminal)

    def advance(
        self, batch_id: str, event: BatchEvent, now: int, *, files: Sequence[File] = (), **changes: Any
    ) -> Batch:
        """Raises TypeError for a name in `changes` that is no changeable field, StateConflict also when the id of a
        file is taken."""
        check_changes(changes)
        with self._tables.lock:
            found = self._find(batch_id)
            new = apply_event(found, event, now, changes)
            if new.is_terminal:  # from now on the sums over the chunks are what is stored
                new = apply_event(self._show(found), event, now, changes)
            insert_files(self._tables, files)
            self._tables.batches[batch_id] = new
            if (kind := event_type(new.status)) is not None:
                entered = getattr(new, TIMESTAMP_FIELD[new.status])
                event_id = f"evt_{secrets.token_hex(16)}"
                self._tables.events.append(OutboxEvent(event_id, batch_id, kind, entered, new.merged_version))
            return self._show(new)

    def amend(self, batch_id: str, *, files: Sequence[File] = (), **changes: Any) -> Batch:
        """Raises TypeError for a name in `changes` that is no changeable field, StateConflict when the id of a file
        is taken."""
        check_changes(changes)
        with self._tables.lock:
            new = replace(self._find(batch_id), **changes)
            insert_files(self._tables, files)
            self._tables.batches[batch_id] = new
            for at, event in enumerate(self._tables.events):
                if event.batch_id == batch_id and "merged_version" in changes:
                    self._tables.events[at] = replace(event, version=new.merged_version)
            return self._show(new)

    def _find(self, batch_id: str) -> Batch:
        try:
            return self._tables.batches[batch_id]
        except KeyError:
            raise NotFound("batch", batch_id) from None

    def _show(self, batch: Batch) -> Batch:
        """Return an open batch with the sums of what its chunks mirror."""
        chunks = () if batch.is_terminal else self._tables.chunks_of(batch.id)
        if not chunks:
            return batch
        counts, usage = RequestCounts(batch.counts.total, failed=batch.rejected), Usage()
        for chunk in chunks:
            counts, usage = counts + RequestCounts(0, chunk.completed, chunk.failed), usage + chunk.usage
        return replace(batch, counts=counts, usage=usage)
