"""Uploads and their parts in memory."""

from collections.abc import Sequence
from dataclasses import replace

from vllm_batch_dagster.adapters.memory.file_records import insert_files
from vllm_batch_dagster.adapters.memory.idempotency_records import find_owner, keep_claim, release_claims
from vllm_batch_dagster.adapters.memory.tables import Tables, by_time
from vllm_batch_dagster.core.claims import Claim
from vllm_batch_dagster.core.errors import ClaimConflict, NotFound, StateConflict
from vllm_batch_dagster.core.models import File
from vllm_batch_dagster.core.uploads import PartTotals, Upload, UploadPart, UploadStatus


class MemoryUploadRecords:
    """See UploadRecords."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def add(self, upload: Upload, *, claim: Claim | None = None) -> str:
        with self._tables.lock:
            owner = find_owner(self._tables, claim, upload.id, upload.created_at)
            if owner == upload.id:
                self._tables.uploads[upload.id] = upload
                keep_claim(self._tables, claim, upload.id, upload.created_at)
            return owner

    def get(self, upload_id: str, *, project_id: str | None = None) -> Upload:
        with self._tables.lock:
            upload = self._tables.uploads.get(upload_id)
        if upload is None or project_id not in (None, upload.project_id):
            raise NotFound("upload", upload_id)
        return upload

    def add_part(self, part: UploadPart) -> None:
        with self._tables.lock:
            self._pending(part.upload_id)
            self._tables.parts[part.id] = part

    def parts(self, upload_id: str) -> Sequence[UploadPart]:
        with self._tables.lock:
            return [part for part in self._tables.parts.values() if part.upload_id == upload_id]

    def held(self, upload_id: str) -> PartTotals:
        parts = self.parts(upload_id)
        return PartTotals(len(parts), sum(part.bytes for part in parts))

    def stored_bytes(self, project_id: str) -> int:
        with self._tables.lock:
            uploads = self._tables.uploads
            parts = [part for part in self._tables.parts.values() if part.upload_id in uploads]
            return sum(part.bytes for part in parts if uploads[part.upload_id].project_id == project_id)

    def begin_completion(self, upload_id: str, file_id: str) -> str | None:
        with self._tables.lock:
            upload = self._pending(upload_id)
            self._tables.uploads[upload_id] = replace(upload, file_id=file_id)
            return upload.file_id

    def complete(
        self, upload_id: str, file: File, part_ids: Sequence[str], md5: str, *, claim: Claim | None = None
    ) -> Upload:
        with self._tables.lock:
            upload = self._pending(upload_id)
            if upload.file_id != file.id:
                raise StateConflict(f"upload {upload_id} is not this attempt's to complete")
            if claim is not None and find_owner(self._tables, claim, upload_id, file.created_at) != upload_id:
                raise ClaimConflict(claim.key.key)
            insert_files(self._tables, (file,))
            keep_claim(self._tables, claim, upload_id, file.created_at)
            done = replace(upload, status=UploadStatus.COMPLETED, part_ids=tuple(part_ids), md5=md5)
            self._tables.uploads[upload_id] = done
            return done

    def close(self, upload_id: str, status: UploadStatus) -> Upload:
        with self._tables.lock:
            closed = replace(self._pending(upload_id), status=status)
            self._tables.uploads[upload_id] = closed
            return closed

    def drop_parts(self, upload_id: str) -> None:
        with self._tables.lock:
            for part in self.parts(upload_id):
                del self._tables.parts[part.id]

    def delete(self, upload_id: str) -> None:
        with self._tables.lock:
            self.drop_parts(upload_id)
            release_claims(self._tables, upload_id)
            self._tables.uploads.pop(upload_id, None)

    def stale(self, now: int, forget_before: int, limit: int) -> Sequence[Upload]:
        with self._tables.lock:
            littered = {part.upload_id for part in self._tables.parts.values()}
            found = [
                upload
                for upload in by_time(self._tables.uploads.values())
                if upload.is_overdue(now)
                or (not upload.is_pending and (upload.id in littered or upload.created_at < forget_before))
            ]
        return found[:limit]

    def _pending(self, upload_id: str) -> Upload:
        upload = self.get(upload_id)
        if not upload.is_pending:
            raise StateConflict(f"upload {upload_id} is {upload.status.value}")
        return upload
