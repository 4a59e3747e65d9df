"""Uploads and their parts. A completion adds the file's record and changes the status in one transaction."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, delete, exists, func, insert, select, update

from vllm_batch_dagster.adapters.store.database import Database
from vllm_batch_dagster.adapters.store.file_records import insert_files
from vllm_batch_dagster.adapters.store.idempotency_records import release_claims, take_claim
from vllm_batch_dagster.adapters.store.paging import within
from vllm_batch_dagster.adapters.store.schema import upload_parts, uploads
from vllm_batch_dagster.core.claims import Claim
from vllm_batch_dagster.core.errors import ClaimConflict, NotFound, StateConflict
from vllm_batch_dagster.core.models import File
from vllm_batch_dagster.core.uploads import PartTotals, Upload, UploadPart, UploadStatus

_PENDING = uploads.c.status == UploadStatus.PENDING.value


class SqlUploadRecords:
    """See UploadRecords. All methods raise StorageFailure when the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, upload: Upload, *, claim: Claim | None = None) -> str:
        with self._database.writing() as connection:
            owner = take_claim(connection, claim, upload.id, upload.created_at)
            if owner == upload.id:
                connection.execute(insert(uploads), _upload_row(upload))
            return owner

    def get(self, upload_id: str, *, project_id: str | None = None) -> Upload:
        with self._database.reading() as connection:
            return _fetch(connection, upload_id, project_id)

    def add_part(self, part: UploadPart) -> None:
        # The shared lock holds off the end of the upload on PostgreSQL, but not other parts; SQLite has one writer.
        query = select(uploads.c.status).where(uploads.c.id == part.upload_id).with_for_update(read=True)
        with self._database.writing() as connection:
            _check_pending(part.upload_id, connection.execute(query).scalar_one_or_none())
            connection.execute(insert(upload_parts), asdict(part))

    def parts(self, upload_id: str) -> Sequence[UploadPart]:
        columns = (upload_parts.c.id, upload_parts.c.upload_id, upload_parts.c.bytes, upload_parts.c.created_at)
        query = select(*columns).where(upload_parts.c.upload_id == upload_id).order_by(upload_parts.c.seq)
        with self._database.reading() as connection:
            return [UploadPart(*row) for row in connection.execute(query)]

    def held(self, upload_id: str) -> PartTotals:
        sums = (func.count(), func.coalesce(func.sum(upload_parts.c.bytes), 0))
        query = select(*sums).where(upload_parts.c.upload_id == upload_id)
        with self._database.reading() as connection:
            return PartTotals(*map(int, connection.execute(query).one()))

    def stored_bytes(self, project_id: str) -> int:
        total = select(func.coalesce(func.sum(upload_parts.c.bytes), 0))
        query = total.join(uploads, uploads.c.id == upload_parts.c.upload_id).where(uploads.c.project_id == project_id)
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def begin_completion(self, upload_id: str, file_id: str) -> str | None:
        with self._database.writing() as connection:
            query = select(uploads).where(uploads.c.id == upload_id).with_for_update()
            row = connection.execute(query).mappings().one_or_none()
            _check_pending(upload_id, row["status"] if row else None)
            connection.execute(update(uploads).where(uploads.c.id == upload_id).values(file_id=file_id))
            return row["file_id"] if row else None

    def complete(
        self, upload_id: str, file: File, part_ids: Sequence[str], md5: str, *, claim: Claim | None = None
    ) -> Upload:
        values = {"status": UploadStatus.COMPLETED.value, "part_ids": _to_json(part_ids), "md5": md5}
        with self._database.writing() as connection:
            mine = (uploads.c.id == upload_id) & _PENDING & (uploads.c.file_id == file.id)
            if not connection.execute(update(uploads).where(mine).values(values)).rowcount:
                status = _fetch(connection, upload_id).status
                raise StateConflict(f"upload {upload_id} is {status.value} and not this attempt's to complete")
            insert_files(connection, (file,))
            if claim is not None and take_claim(connection, claim, upload_id, file.created_at) != upload_id:
                raise ClaimConflict(claim.key.key)
            return _fetch(connection, upload_id)

    def close(self, upload_id: str, status: UploadStatus) -> Upload:
        with self._database.writing() as connection:
            mine = (uploads.c.id == upload_id) & _PENDING
            if not connection.execute(update(uploads).where(mine).values(status=status.value)).rowcount:
                _check_pending(upload_id, _fetch(connection, upload_id).status)
            return _fetch(connection, upload_id)

    def drop_parts(self, upload_id: str) -> None:
        with self._database.writing() as connection:
            connection.execute(delete(upload_parts).where(upload_parts.c.upload_id == upload_id))

    def delete(self, upload_id: str) -> None:
        with self._database.writing() as connection:
            connection.execute(delete(upload_parts).where(upload_parts.c.upload_id == upload_id))
            release_claims(connection, upload_id)
            connection.execute(delete(uploads).where(uploads.c.id == upload_id))

    def stale(self, now: int, forget_before: int, limit: int) -> Sequence[Upload]:
        has_parts = exists().where(upload_parts.c.upload_id == uploads.c.id)
        is_overdue = _PENDING & (uploads.c.expires_at <= now)
        is_litter = ~_PENDING & (has_parts | (uploads.c.created_at < forget_before))
        query = select(uploads).where(is_overdue | is_litter).order_by(uploads.c.created_at, uploads.c.seq)
        with self._database.reading() as connection:
            return [_read(row) for row in connection.execute(query.limit(limit)).mappings()]


def _fetch(connection: Connection, upload_id: str, project_id: str | None = None) -> Upload:
    query = within(select(uploads).where(uploads.c.id == upload_id), uploads, project_id)
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        raise NotFound("upload", upload_id)
    return _read(row)


def _check_pending(upload_id: str, status: str | None) -> None:
    if status is None:
        raise NotFound("upload", upload_id)
    if status != UploadStatus.PENDING.value:
        raise StateConflict(f"upload {upload_id} is {status}")


def _upload_row(upload: Upload) -> dict[str, Any]:
    return asdict(upload) | {"status": upload.status.value, "part_ids": _to_json(upload.part_ids)}


def _to_json(part_ids: Sequence[str]) -> str:
    return msgspec.json.encode(part_ids).decode()


def _read(row: RowMapping) -> Upload:
    values = {name: row[name] for name in Upload.__dataclass_fields__}
    part_ids = msgspec.json.decode(values["part_ids"], type=tuple[str, ...])
    return Upload(**values | {"status": UploadStatus(values["status"]), "part_ids": part_ids})
