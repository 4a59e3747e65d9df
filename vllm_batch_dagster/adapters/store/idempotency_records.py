"""What each Idempotency-Key made. The file and the batch table take a claim in the transaction of their new row."""

from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from vllm_batch_dagster.adapters.store.database import Database
from vllm_batch_dagster.adapters.store.schema import claims
from vllm_batch_dagster.core.claims import CLAIM_SECONDS, Claim, ClaimKey
from vllm_batch_dagster.core.errors import ClaimConflict


class SqlIdempotencyRecords:
    """See IdempotencyRecords. All methods raise StorageFailure when the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, claim: Claim, now: float) -> str | None:
        with self._database.reading() as connection:
            row = _fetch(connection, claim.key, now)
        return None if row is None else _owner(claim, row)

    def is_known(self, key: ClaimKey, now: float) -> bool:
        with self._database.reading() as connection:
            return _fetch(connection, key, now) is not None


def take_claim(connection: Connection, claim: Claim | None, object_id: str, now: int) -> str:
    """Take the claim for a new object in the caller's transaction. Returns the id of the object that has it.

    That is `object_id` when the claim was free, or when there is none. A transaction of somebody else that takes the
    same claim is waited for. Raises ClaimConflict.
    """
    if claim is None:
        return object_id
    connection.execute(delete(claims).where(claims.c.created_at <= now - CLAIM_SECONDS))
    while not _insert(connection, claim, object_id, now):
        row = _fetch(connection, claim.key, now)
        if row is not None:  # else its object was deleted in this very moment
            return _owner(claim, row)
    return object_id


def release_claims(connection: Connection, object_id: str) -> None:
    """Forget the claim of an object that is deleted: who sends the call again wants it again."""
    connection.execute(delete(claims).where(claims.c.object_id == object_id))


def _insert(connection: Connection, claim: Claim, object_id: str, now: int) -> bool:
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(claims).values(
        project_id=claim.key.project_id,
        operation=claim.key.operation,
        key=claim.key.key,
        fingerprint=claim.fingerprint,
        object_id=object_id,
        created_at=now,
    )
    inserted = statement.on_conflict_do_nothing().returning(claims.c.key)  # psycopg has no row count for this
    return connection.execute(inserted).one_or_none() is not None


def _fetch(connection: Connection, key: ClaimKey, now: float) -> Row[str, str] | None:
    query = select(claims.c.fingerprint, claims.c.object_id).where(_is_key(key))
    return connection.execute(query.where(claims.c.created_at > now - CLAIM_SECONDS)).one_or_none()


def _is_key(key: ClaimKey) -> ColumnElement[bool]:
    columns: Any = claims.c
    return and_(columns.project_id == key.project_id, columns.operation == key.operation, columns.key == key.key)


def _owner(claim: Claim, row: Row[str, str]) -> str:
    if row.fingerprint != claim.fingerprint:
        raise ClaimConflict(claim.key.key)
    return str(row.object_id)
