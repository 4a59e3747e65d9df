"""The pauses of the batch store. Written by operators and by runs, read by the sensor, by runs and by the API."""

from collections.abc import Sequence
from dataclasses import asdict

from sqlalchemy import ColumnElement, RowMapping, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from vllm_batch_dagster.adapters.store.database import Database
from vllm_batch_dagster.adapters.store.schema import pauses
from vllm_batch_dagster.core.pauses import Pause, PauseCause

_KEY = ["scope", "cause"]


class SqlPauseRecords:
    """See PauseRecords. All methods raise StorageFailure when the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def list(self) -> Sequence[Pause]:
        query = select(pauses)
        with self._database.reading() as connection:
            found = [_read(row) for row in connection.execute(query).mappings()]
        # Sorted here: databases collate text differently, and there are never many.
        return sorted(found, key=lambda pause: (pause.since, pause.scope, pause.cause.value))

    def put(self, pause: Pause) -> None:
        row = asdict(pause) | {"cause": pause.cause.value}
        with self._database.writing() as connection:
            # Both dialects know this clause; two runs may put the same pause at the same moment.
            kind = sqlite if connection.dialect.name == "sqlite" else postgresql
            connection.execute(kind.insert(pauses).values(row).on_conflict_do_update(index_elements=_KEY, set_=row))

    def remove(self, scope: str, cause: PauseCause) -> bool:
        with self._database.writing() as connection:
            return connection.execute(delete(pauses).where(_is(scope, cause))).rowcount > 0


def _is(scope: str, cause: PauseCause) -> ColumnElement[bool]:
    return (pauses.c.scope == scope) & (pauses.c.cause == cause.value)


def _read(row: RowMapping) -> Pause:
    return Pause(**{**row, "cause": PauseCause(row["cause"])})
