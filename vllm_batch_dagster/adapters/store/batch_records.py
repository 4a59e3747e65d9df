"""The batch table and the outbox. Every change of status is a compare-and-set with its event, in one transaction."""

import secrets
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import Connection, RowMapping, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError

from vllm_batch_dagster.adapters.store.database import Database
from vllm_batch_dagster.adapters.store.file_records import insert_files
from vllm_batch_dagster.adapters.store.idempotency_records import take_claim
from vllm_batch_dagster.adapters.store.paging import fetch_page, within
from vllm_batch_dagster.adapters.store.rows import MIRRORED, batch_row, read_batch, show_progress, to_columns
from vllm_batch_dagster.adapters.store.rules import apply_event, check_changes, event_type
from vllm_batch_dagster.adapters.store.schema import NEEDS_ATTENTION, batches, chunks, events
from vllm_batch_dagster.core.claims import Claim
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.models import Batch, File, Page
from vllm_batch_dagster.core.states import TIMESTAMP_FIELD, BatchEvent


class SqlBatchRecords:
    """See BatchRecords. All methods raise StorageFailure when the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, batch: Batch, *, claim: Claim | None = None) -> str:
        """Raises StateConflict when the id is taken."""
        with self._database.writing() as connection:
            owner = take_claim(connection, claim, batch.id, batch.created_at)
            if owner == batch.id:
                _insert(connection, batch)
            return owner

    def get(self, batch_id: str, *, project_id: str | None = None) -> Batch:
        with self._database.reading() as connection:
            return _fetch(connection, batch_id, project_id)

    def list(self, *, after: str | None = None, limit: int = 20, project_id: str | None = None) -> Page[Batch]:
        with self._database.reading() as connection:
            rows = fetch_page(
                connection,
                select(batches),
                batches,
                kind="batch",
                after=after,
                limit=limit,
                descending=True,
                project_id=project_id,
            )
            return Page(_read(connection, rows.data), rows.has_more)

    def open(self) -> Sequence[Batch]:
        query = select(batches).where(text(NEEDS_ATTENTION)).order_by(batches.c.created_at, batches.c.seq)
        with self._database.reading() as connection:
            return _read(connection, connection.execute(query).mappings())

    def advance(
        self, batch_id: str, event: BatchEvent, now: int, *, files: Sequence[File] = (), **changes: object
    ) -> Batch:
        """Raises TypeError for a name in `changes` that is no changeable field, StateConflict also when the id of a
        file is taken."""
        check_changes(changes)
        # Ends: whoever was faster has moved the batch along a machine without loops, and then this event is illegal.
        while True:
            with self._database.writing() as connection:
                old = _fetch(connection, batch_id)
                new = apply_event(old, event, now, changes)
                if _move(connection, old, new, changes):
                    insert_files(connection, files)
                    return _fetch(connection, batch_id)

    def amend(self, batch_id: str, *, files: Sequence[File] = (), **changes: object) -> Batch:
        """Raises TypeError for a name in `changes` that is no changeable field, StateConflict when the id of a file
        is taken."""
        check_changes(changes)
        with self._database.writing() as connection:
            if columns := to_columns(changes):
                connection.execute(update(batches).where(batches.c.id == batch_id).values(columns))
            if (version := columns.get("merged_version")) is not None:
                connection.execute(update(events).where(events.c.batch_id == batch_id).values(version=version))
            batch = _fetch(connection, batch_id)
            insert_files(connection, files)
            return batch


def _insert(connection: Connection, batch: Batch) -> None:
    try:
        connection.execute(insert(batches), batch_row(batch))
    except IntegrityError:
        raise StateConflict(f"a batch with this id exists already: {batch.id}") from None


def _read(connection: Connection, rows: Iterable[RowMapping]) -> tuple[Batch, ...]:
    """Read batches, those that are open with the progress of their chunks."""
    read = [read_batch(row) for row in rows]
    sums = _sum_chunks(connection, [batch.id for batch in read if not batch.is_terminal])
    return tuple(show_progress(batch, sums[batch.id]) if batch.id in sums else batch for batch in read)


def _sum_chunks(connection: Connection, batch_ids: Sequence[str]) -> Mapping[str, RowMapping]:
    """Return what the chunks mirror, by batch; a batch without chunks is left out."""
    if not batch_ids:
        return {}
    sums = (func.sum(chunks.c[name]).label(name) for name in MIRRORED)
    query = select(chunks.c.batch_id, *sums).where(chunks.c.batch_id.in_(batch_ids)).group_by(chunks.c.batch_id)
    return {row["batch_id"]: row for row in connection.execute(query).mappings()}


def _fetch(connection: Connection, batch_id: str, project_id: str | None = None) -> Batch:
    query = within(select(batches).where(batches.c.id == batch_id), batches, project_id)
    rows = connection.execute(query).mappings().all()
    if not rows:
        raise NotFound("batch", batch_id)
    return _read(connection, rows)[0]


def _move(connection: Connection, old: Batch, new: Batch, changes: Mapping[str, object]) -> bool:
    """Store `new` unless the status is no longer that of `old`; say whether it was stored."""
    entered = TIMESTAMP_FIELD[new.status]
    columns = to_columns({**changes, "status": new.status, entered: getattr(new, entered)})
    kind = event_type(new.status)
    if kind is not None:
        columns |= to_columns({"counts": new.counts, "usage": new.usage})  # from now on the stored ones hold
    still = (batches.c.id == old.id) & (batches.c.status == old.status.value)
    if not connection.execute(update(batches).where(still).values(columns)).rowcount:
        return False
    if kind is not None:
        _write_event(connection, new, kind, getattr(new, entered))
    return True


def _write_event(connection: Connection, batch: Batch, kind: str, created_at: int) -> None:
    event_id = f"evt_{secrets.token_hex(16)}"
    row = {"id": event_id, "batch_id": batch.id, "type": kind, "created_at": created_at}
    connection.execute(insert(events), row | {"version": batch.merged_version})
