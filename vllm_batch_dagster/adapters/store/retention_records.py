"""The batch store as retention sees it: what has expired or ended, of every project, and how it goes."""

from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import Connection, delete, exists, func, select, text, update

from vllm_batch_dagster.adapters.store.database import Database
from vllm_batch_dagster.adapters.store.idempotency_records import release_claims
from vllm_batch_dagster.adapters.store.rows import read_batch, read_file
from vllm_batch_dagster.adapters.store.schema import (
    NOT_PURGED,
    attempts,
    batches,
    chunks,
    deliveries,
    events,
    files,
    pauses,
)
from vllm_batch_dagster.core.deliveries import DeliveryState
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.models import Batch, File
from vllm_batch_dagster.core.states import TERMINAL

_IDS_PER_QUERY = 500  # SQLite and PostgreSQL bound the number of parameters
_end = func.coalesce(*(batches.c[f"{status.value}_at"] for status in sorted(TERMINAL)))
_is_over = batches.c.status.in_(sorted(status.value for status in TERMINAL)) & (
    batches.c.result_version == batches.c.merged_version
)
# Attempts at a delivery go on for 72 hours, however short the retention is.
_is_on_its_way = exists().where(
    deliveries.c.batch_id == batches.c.id, deliveries.c.state == DeliveryState.PENDING.value
)


class SqlRetentionRecords:
    """See RetentionRecords. All methods raise StorageFailure when the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def files(self, *, after: str = "", limit: int, expired_by: int | None = None) -> Sequence[File]:
        query = select(files).where(files.c.id > after).order_by(files.c.id).limit(limit)
        if expired_by is not None:
            query = query.where(files.c.expires_at <= expired_by)
        with self._database.reading() as connection:
            return [read_file(row) for row in connection.execute(query).mappings()]

    def expiries(self, file_ids: Collection[str]) -> Mapping[str, int | None]:
        wanted, found = list(file_ids), dict[str, int | None]()
        with self._database.reading() as connection:
            for start in range(0, len(wanted), _IDS_PER_QUERY):
                some = wanted[start : start + _IDS_PER_QUERY]
                rows = connection.execute(select(files.c.id, files.c.expires_at).where(files.c.id.in_(some)))
                found |= {row.id: row.expires_at for row in rows}
        return found

    def ended(self, *, after: str = "", limit: int, by: int, purged: bool) -> Sequence[Batch]:
        which = batches.c.purged_at.is_not(None) if purged else text(NOT_PURGED)
        query = select(batches).where(which, _is_over, ~_is_on_its_way, _end <= by, batches.c.id > after)
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(batches.c.id).limit(limit)).mappings()
            return [read_batch(row) for row in rows]

    def purge(self, batch_id: str, now: int) -> None:
        with self._database.writing() as connection:
            # The chunks first, as in every other method: two orders of locking could block each other.
            of_batch = select(chunks.c.idx).where(chunks.c.batch_id == batch_id).order_by(chunks.c.idx)
            connection.execute(of_batch.with_for_update()).all()
            _lock_ended(connection, batch_id)
            connection.execute(delete(attempts).where(attempts.c.batch_id == batch_id))
            connection.execute(delete(chunks).where(chunks.c.batch_id == batch_id))
            connection.execute(delete(pauses).where(pauses.c.scope == batch_id))
            unpurged = (batches.c.id == batch_id) & batches.c.purged_at.is_(None)
            connection.execute(update(batches).where(unpurged).values(purged_at=now))

    def forget(self, batch_id: str) -> None:
        with self._database.writing() as connection:
            if _lock_ended(connection, batch_id).purged_at is None:
                raise StateConflict(f"{batch_id} still has its working data: purge it first")
            connection.execute(delete(deliveries).where(deliveries.c.batch_id == batch_id))
            connection.execute(delete(events).where(events.c.batch_id == batch_id))
            release_claims(connection, batch_id)
            connection.execute(delete(batches).where(batches.c.id == batch_id))


def _lock_ended(connection: Connection, batch_id: str) -> Batch:
    """Lock and return a batch. Raises NotFound, and StateConflict while it is open or stale."""
    query = select(batches, _is_on_its_way.label("on_its_way")).where(batches.c.id == batch_id)
    row = connection.execute(query.with_for_update()).mappings().one_or_none()
    if row is None:
        raise NotFound("batch", batch_id)
    batch = read_batch(row)
    if batch.is_stale or not batch.is_terminal:
        raise StateConflict(f"{batch_id} is {batch.status.value} and in use: it cannot be purged")
    if row["on_its_way"]:
        raise StateConflict(f"{batch_id} has deliveries that are still tried: it cannot be purged")
    return batch
