"""What the uploads need from the batch store and from the file store, which take it in in `ports.py`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO, Protocol

from vllm_batch_dagster.core.claims import Claim
from vllm_batch_dagster.core.models import File
from vllm_batch_dagster.core.uploads import PartTotals, Upload, UploadPart, UploadStatus

if TYPE_CHECKING:
    from vllm_batch_dagster.core.ports import StoredFile


class UploadRecords(Protocol):
    """Uploads and their parts. Every change of status is a compare-and-set on `pending`."""

    def add(self, upload: Upload, *, claim: Claim | None = None) -> str:
        """Store a new upload durably, with its claim. Returns its id, or that of the upload that has the claim already:
        then nothing is stored. Raises ClaimConflict."""

    def get(self, upload_id: str, *, project_id: str | None = None) -> Upload:
        """Raises NotFound("upload", id), also for one of another project than `project_id` (None: all projects)."""

    def add_part(self, part: UploadPart) -> None:
        """Store the record of a part. Raises NotFound, and StateConflict when the upload is not pending."""

    def parts(self, upload_id: str) -> Sequence[UploadPart]:
        """In the order of arrival; empty for an unknown upload."""

    def held(self, upload_id: str) -> PartTotals:
        """What the parts are together."""

    def stored_bytes(self, project_id: str) -> int:
        """Bytes of all parts of a project's uploads that are still there."""

    def begin_completion(self, upload_id: str, file_id: str) -> str | None:
        """Let the attempt that writes `file_id` be the only one that can complete the upload. Returns the file id of
        the attempt before, which cannot any more. Raises NotFound, and StateConflict when it is not pending."""

    def complete(
        self, upload_id: str, file: File, part_ids: Sequence[str], md5: str, *, claim: Claim | None = None
    ) -> Upload:
        """Add the record of `file`, complete the upload and keep the claim, in one transaction. Raises NotFound,
        ClaimConflict when another upload or body has the claim, and StateConflict unless the upload is pending and the
        attempt that writes this file is the newest."""

    def close(self, upload_id: str, status: UploadStatus) -> Upload:
        """Cancel or expire. Raises NotFound, and StateConflict when the upload is not pending."""

    def drop_parts(self, upload_id: str) -> None:
        """Forget the parts. Harmless when there are none."""

    def delete(self, upload_id: str) -> None:
        """Forget the upload with its parts and claims. Harmless when it is not there."""

    def stale(self, now: int, forget_before: int, limit: int) -> Sequence[Upload]:
        """Up to `limit` uploads that somebody has to clean up, oldest first: pending ones that expired by `now`,
        closed ones that still have parts, closed ones that were created before `forget_before`."""


class PartStore(Protocol):
    """Contents of the parts of uploads. No file id leads to one."""

    def create(self, upload_id: str, part_id: str) -> "StoredFile": ...

    def open(self, upload_id: str, part_id: str) -> BinaryIO:
        """Raises NotFound("part", id)."""

    def delete(self, upload_id: str) -> None:
        """Delete all parts of an upload, also those without a record. Harmless when there are none."""
