"""The file table. Written by uploads and merges, read by the API and by validation."""

from collections.abc import Sequence

from sqlalchemy import Connection, delete, insert, select
from sqlalchemy.exc import IntegrityError

from vllm_batch_dagster.adapters.store.database import Database
from vllm_batch_dagster.adapters.store.paging import fetch_page
from vllm_batch_dagster.adapters.store.rows import file_row, read_file
from vllm_batch_dagster.adapters.store.schema import files
from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.models import File, Page


class SqlFileRecords:
    """See FileRecords. All methods raise StorageFailure when the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, file: File) -> None:
        """Raises StateConflict when the id is taken."""
        with self._database.writing() as connection:
            insert_files(connection, (file,))

    def get(self, file_id: str) -> File:
        with self._database.reading() as connection:
            row = connection.execute(select(files).where(files.c.id == file_id)).mappings().one_or_none()
        if row is None:
            raise NotFound("file", file_id)
        return read_file(row)

    def list(
        self, *, purpose: str | None = None, after: str | None = None, limit: int = 10_000, order: str = "desc"
    ) -> Page[File]:
        query = select(files) if purpose is None else select(files).where(files.c.purpose == purpose)
        with self._database.reading() as connection:
            rows = fetch_page(
                connection, query, files, kind="file", after=after, limit=limit, descending=order != "asc"
            )
        return Page(tuple(read_file(row) for row in rows.data), rows.has_more)

    def delete(self, file_id: str) -> None:
        with self._database.writing() as connection:
            if not connection.execute(delete(files).where(files.c.id == file_id)).rowcount:
                raise NotFound("file", file_id)


def insert_files(connection: Connection, new: Sequence[File]) -> None:
    """Add records in the caller's transaction. Raises StateConflict when an id is taken."""
    if not new:
        return
    try:
        connection.execute(insert(files), [file_row(file) for file in new])
    except IntegrityError:
        taken = ", ".join(file.id for file in new)
        raise StateConflict(f"a file with this id exists already: {taken}") from None
