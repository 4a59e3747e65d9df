"""The bearer keys. Written by `vllm-batch keys`, read by the API once a second at most."""

from collections.abc import Sequence

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from vllm_batch_dagster.adapters.store.database import Database
from vllm_batch_dagster.adapters.store.schema import keys
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.keys import Key

_COLUMNS = [keys.c[name] for name in ("id", "project_id", "hash", "label", "created_at", "revoked_at", "last_used_at")]


class SqlKeyRecords:
    """See KeyRecords. All methods raise StorageFailure when the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, key: Key) -> None:
        """Raises StateConflict when the id or the hash is taken."""
        row = {column.name: getattr(key, column.name) for column in _COLUMNS}
        with self._database.writing() as connection:
            try:
                connection.execute(insert(keys), row)
            except IntegrityError:
                raise StateConflict(f"this key exists already: {key.id}") from None

    def list(self) -> Sequence[Key]:
        with self._database.reading() as connection:
            return [Key(*row) for row in connection.execute(select(*_COLUMNS).order_by(keys.c.seq))]

    def revoke(self, key_id: str, now: int) -> Key:
        live = (keys.c.id == key_id) & keys.c.revoked_at.is_(None)
        with self._database.writing() as connection:
            connection.execute(update(keys).where(live).values(revoked_at=now))
            return _fetch(connection, key_id)

    def touch(self, key_id: str, now: int) -> None:
        with self._database.writing() as connection:
            connection.execute(update(keys).where(keys.c.id == key_id).values(last_used_at=now))


def _fetch(connection: Connection, key_id: str) -> Key:
    row = connection.execute(select(*_COLUMNS).where(keys.c.id == key_id)).one_or_none()
    if row is None:
        raise NotFound("key", key_id)
    return Key(*row)
