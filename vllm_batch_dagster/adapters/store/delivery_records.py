"""The deliveries of the outbox events. Written by the `deliveries` asset, read by the sensor and the command line."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import Connection, RowMapping, func, insert, select, text, union_all, update

from vllm_batch_dagster.adapters.store.database import Database
from vllm_batch_dagster.adapters.store.schema import NOT_PLANNED, PENDING, deliveries, events
from vllm_batch_dagster.core.deliveries import DeliveryRecord, DeliveryState
from vllm_batch_dagster.core.errors import NotFound

_COLUMNS = [deliveries.c[field.name] for field in fields(DeliveryRecord)]
_COMPARED = ("state", "attempts", "next_attempt_at")


class SqlDeliveryRecords:
    """See DeliveryRecords. All methods raise StorageFailure when the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def plan(self, event_id: str, version: int, deliveries: Sequence[DeliveryRecord]) -> None:
        planned = update(events).where(events.c.id == event_id).values(planned_version=version)
        with self._database.writing() as connection:
            # The event first: its row is the lock under which two planners come one after the other.
            if not connection.execute(planned).rowcount:
                raise NotFound("event", event_id)
            _insert_new(connection, deliveries)

    def get(self, delivery_id: str) -> DeliveryRecord:
        with self._database.reading() as connection:
            query = select(*_COLUMNS).where(deliveries.c.id == delivery_id)
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise NotFound("delivery", delivery_id)
        return _read(row)

    def of_batch(self, batch_id: str) -> Sequence[DeliveryRecord]:
        query = select(*_COLUMNS).where(deliveries.c.batch_id == batch_id).order_by(deliveries.c.seq)
        with self._database.reading() as connection:
            return [_read(row) for row in connection.execute(query).mappings()]

    def list(
        self, *, limit: int, states: Collection[DeliveryState] = (), project_id: str | None = None
    ) -> Sequence[DeliveryRecord]:
        query = select(*_COLUMNS).order_by(deliveries.c.seq.desc()).limit(limit)
        if states:
            query = query.where(deliveries.c.state.in_(sorted(state.value for state in states)))
        if project_id is not None:
            query = query.where(deliveries.c.project_id == project_id)
        with self._database.reading() as connection:
            return [_read(row) for row in connection.execute(query).mappings()]

    def due(self, now: float, limit: int) -> Sequence[str]:
        unplanned = select(events.c.batch_id, events.c.created_at.label("at")).where(text(NOT_PLANNED))
        waiting = select(deliveries.c.batch_id, deliveries.c.next_attempt_at.label("at"))
        both = union_all(unplanned, waiting.where(text(PENDING), deliveries.c.next_attempt_at <= now)).subquery()
        first = func.min(both.c.at)
        query = select(both.c.batch_id).group_by(both.c.batch_id).order_by(first, both.c.batch_id).limit(limit)
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())

    def change(self, seen: DeliveryRecord, new: DeliveryRecord) -> bool:
        row = _row(seen)
        same = (deliveries.c[name] == row[name] for name in _COMPARED)
        statement = update(deliveries).where(deliveries.c.id == seen.id, *same).values(_row(new))
        with self._database.writing() as connection:
            return bool(connection.execute(statement).rowcount)


def _insert_new(connection: Connection, planned: Sequence[DeliveryRecord]) -> None:
    ids = [delivery.id for delivery in planned]
    known = set(connection.execute(select(deliveries.c.id).where(deliveries.c.id.in_(ids))).scalars())
    if new := [_row(delivery) for delivery in planned if delivery.id not in known]:
        connection.execute(insert(deliveries), new)


def _row(delivery: DeliveryRecord) -> dict[str, Any]:
    return asdict(delivery) | {"state": delivery.state.value}


def _read(row: RowMapping) -> DeliveryRecord:
    return DeliveryRecord(**{**row, "state": DeliveryState(row["state"])})
