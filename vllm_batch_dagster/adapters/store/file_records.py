"""The file table. Written by uploads and merges, read by the API and by validation."""

from collections.abc import Sequence

from sqlalchemy import Connection, delete, func, insert, or_, select
from sqlalchemy.exc import IntegrityError

from vllm_batch_dagster.adapters.store.database import Database
from vllm_batch_dagster.adapters.store.idempotency_records import release_claims, take_claim
from vllm_batch_dagster.adapters.store.paging import fetch_page, within
from vllm_batch_dagster.adapters.store.rows import file_row, read_file
from vllm_batch_dagster.adapters.store.schema import files
from vllm_batch_dagster.core.claims import Claim
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.models import File, Page


class SqlFileRecords:
    """See FileRecords. All methods raise StorageFailure when the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, file: File, *, claim: Claim | None = None) -> str:
        """Raises StateConflict when the id is taken."""
        with self._database.writing() as connection:
            owner = take_claim(connection, claim, file.id, file.created_at)
            if owner == file.id:
                insert_files(connection, (file,))
            return owner

    def get(self, file_id: str, *, project_id: str | None = None) -> File:
        query = within(select(files).where(files.c.id == file_id), files, project_id)
        with self._database.reading() as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise NotFound("file", file_id)
        return read_file(row)

    def list(
        self,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: str = "desc",
        project_id: str | None = None,
    ) -> Page[File]:
        query = select(files) if purpose is None else select(files).where(files.c.purpose == purpose)
        with self._database.reading() as connection:
            rows = fetch_page(
                connection,
                query,
                files,
                kind="file",
                after=after,
                limit=limit,
                descending=order != "asc",
                project_id=project_id,
            )
        return Page(tuple(read_file(row) for row in rows.data), rows.has_more)

    def delete(self, file_id: str) -> None:
        with self._database.writing() as connection:
            if not connection.execute(delete(files).where(files.c.id == file_id)).rowcount:
                raise NotFound("file", file_id)
            release_claims(connection, file_id)

    def stored_bytes(self, project_id: str, now: float) -> int:
        is_live = or_(files.c.expires_at.is_(None), files.c.expires_at > now)
        query = select(func.coalesce(func.sum(files.c.bytes), 0)).where(files.c.project_id == project_id, is_live)
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one())  # PostgreSQL adds bigints up to a decimal


def insert_files(connection: Connection, new: Sequence[File]) -> None:
    """Add records in the caller's transaction. Raises StateConflict when an id is taken."""
    if not new:
        return
    try:
        connection.execute(insert(files), [file_row(file) for file in new])
    except IntegrityError:
        taken = ", ".join(file.id for file in new)
        raise StateConflict(f"a file with this id exists already: {taken}") from None
