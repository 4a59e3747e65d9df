"""A file that comes in parts: create, parts in any order and at once, complete or cancel. The second door of the path.

Called by the API; `sweep_uploads` by retention. A part is durable before it is acknowledged. A completion writes the
whole file beside the parts, then makes it visible: contents first, then in one transaction the record and the status.
Killed at any point, it leaves the upload pending with all its parts, and the next attempt removes what it had written.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from vllm_batch_dagster.core.claims import Claim, ClaimKey, claim_completion, claim_upload
from vllm_batch_dagster.core.creation import FileFacts, Randomness, expires_at, new_file_id
from vllm_batch_dagster.core.errors import NotFound, StateConflict, StorageFailure
from vllm_batch_dagster.core.limits import StorageRoom
from vllm_batch_dagster.core.models import DAY_SECONDS, DEFAULT_PROJECT, File
from vllm_batch_dagster.core.ports import BatchStore, Clock, FileStore, StoredFile
from vllm_batch_dagster.core.uploads import (
    MAX_PART_BYTES,
    Completion,
    Upload,
    UploadPart,
    UploadStatus,
    check_md5,
    check_pending,
    check_room,
    make_upload,
    new_part_id,
    order_parts,
    part_too_large,
)
from vllm_batch_dagster.failpoints import failpoint
from vllm_batch_dagster.stages.intake import discard_unregistered, file_too_large, find_file

JOIN_BLOCK_BYTES = 1 << 20
REMEMBERED_SECONDS = DAY_SECONDS  # how long a closed upload answers a client that asks again
SWEEP_PAGE = 500


@dataclass(frozen=True, slots=True)
class UploadPorts:
    """What every step of an upload acts upon."""

    store: BatchStore
    files: FileStore
    clock: Clock
    randomness: Randomness


def create_upload(
    params: Mapping[str, object],
    ports: UploadPorts,
    *,
    max_bytes: int = 0,
    room: StorageRoom | None = None,
    project_id: str = DEFAULT_PROJECT,
    claim_key: ClaimKey | None = None,
    on_repeat: Callable[[], None] = lambda: None,
) -> Upload:
    """Store a new upload in `pending`. `max_bytes` 0 and `room` None mean no limit. When `claim_key` has made one of
    the same parameters before, that one is returned, and `on_repeat` called. Raises InvalidInput, ClaimConflict."""
    upload = make_upload(params, ports.randomness, int(ports.clock()), project_id)
    if 0 < max_bytes < upload.bytes:
        raise file_too_large(max_bytes, param="bytes")
    if room is not None:
        room.check(upload.bytes)
    kept = ports.store.uploads.add(upload, claim=claim_upload(claim_key, params) if claim_key else None)
    if kept != upload.id:
        on_repeat()
        return find_upload(kept, ports)
    return upload


def find_upload(upload_id: str, ports: UploadPorts, project_id: str | None = None) -> Upload:
    """Return the upload as it is now: one that is overdue becomes `expired` here. Raises NotFound."""
    upload = ports.store.uploads.get(upload_id, project_id=project_id)
    if upload.is_overdue(ports.clock()):
        return _close(upload, UploadStatus.EXPIRED, ports)
    return upload


class PartReceipt:
    """A part that is arriving. `write` its bytes, then `finish`; `abandon` leaves nothing behind.

    Raises InvalidInput at once for an upload that is not pending or full. One caller at a time.
    """

    def __init__(self, upload: Upload, ports: UploadPorts, room: StorageRoom | None = None) -> None:
        check_pending(upload)
        held = ports.store.uploads.held(upload.id)
        check_room(upload, held)
        self._upload, self._ports, self._room = upload, ports, room
        self._id = new_part_id(ports.randomness)
        self._stored = ports.files.parts.create(upload.id, self._id)
        self._size = 0

    def write(self, data: bytes | bytearray) -> None:
        """Raises InvalidInput past 64 MiB and past `room`, StorageFailure when the disk refuses."""
        self._size += len(data)
        if self._size > MAX_PART_BYTES:
            raise part_too_large()
        if self._room is not None:
            self._room.check(self._size)
        self._stored.write(data)

    def finish(self) -> UploadPart:
        """Make the part durable, then record it. Raises InvalidInput when the upload was closed meanwhile."""
        size, _digest = self._stored.commit()
        uploads = self._ports.store.uploads
        part = UploadPart(self._id, self._upload.id, size, int(self._ports.clock()))
        try:
            uploads.add_part(part)
        except (StateConflict, NotFound):
            self._ports.files.parts.delete(self._upload.id)
            check_pending(uploads.get(self._upload.id))
            raise
        return part

    def abandon(self) -> None:
        """Remove what has arrived. Harmless after `finish`."""
        self._stored.discard()


def complete_upload(
    upload: Upload,
    wanted: Completion,
    ports: UploadPorts,
    *,
    claim_key: ClaimKey | None = None,
    on_repeat: Callable[[], None] = lambda: None,
    go_on: Callable[[], None] = lambda: None,
) -> tuple[Upload, File]:
    """Make the parts a file, and return it with the completed upload. Repeated with the same parts, it returns the
    same file again and calls `on_repeat`. `go_on` is called before each block, and may raise to give up: then the
    upload stays pending. The project's room was asked for with each part, and the file takes the place of the parts.

    Raises InvalidInput (parts, total, checksum, an upload that is closed), StorageFailure, NotFound for a file that
    was deleted since, ClaimConflict, StateConflict when another process completes the upload at this moment.
    """
    claim = claim_completion(claim_key, upload.id, wanted.part_ids, wanted.md5) if claim_key else None
    if claim is not None:
        ports.store.idempotency.find(claim, ports.clock())
    if upload.status is UploadStatus.COMPLETED and upload.part_ids == wanted.part_ids:
        on_repeat()
        return _repeat(upload, wanted, ports)
    check_pending(upload)
    parts = order_parts(upload, ports.store.uploads.parts(upload.id), wanted.part_ids)
    try:
        return _publish(upload, parts, wanted, claim, ports, go_on)
    except (StateConflict, NotFound) as failure:
        current = ports.store.uploads.get(upload.id)  # somebody else was faster, or closed it
        if not current.is_pending:
            return complete_upload(current, wanted, ports, claim_key=claim_key, on_repeat=on_repeat)
        if isinstance(failure, NotFound):
            raise StorageFailure(f"a part of upload {upload.id} is gone from the disk: send it again") from failure
        raise StateConflict(f"Upload {upload.id} is being completed by another call. Ask again later.") from failure


def cancel_upload(upload: Upload, ports: UploadPorts) -> Upload:
    """Cancel the upload and delete its parts. One that is cancelled is returned as it is. Raises InvalidInput."""
    if upload.status is UploadStatus.CANCELLED:
        return upload
    check_pending(upload)
    closed = _close(upload, UploadStatus.CANCELLED, ports)
    if closed.status is not UploadStatus.CANCELLED:
        check_pending(closed)
    return closed


@dataclass(frozen=True, slots=True)
class UploadSweep:
    """What a sweep did, or would do: ids of uploads that expired, that lost their parts, that were forgotten, and of
    those whose parts could not be removed. `bytes` are those of the parts."""

    expired: tuple[str, ...] = ()
    cleared: tuple[str, ...] = ()
    forgotten: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    bytes: int = 0


def sweep_uploads(store: BatchStore, files: FileStore, now: float, *, dry_run: bool = False) -> UploadSweep:
    """Expire uploads that are overdue, delete the parts of all closed ones, and forget those of yesterday.

    Takes 500 at a time; the rest waits for the next sweep. `dry_run` only looks.
    """
    forget_before = int(now) - REMEMBERED_SECONDS
    stale = store.uploads.stale(int(now), forget_before, SWEEP_PAGE)
    held = {upload.id: store.uploads.held(upload.id) for upload in stale}
    report = UploadSweep(
        expired=tuple(upload.id for upload in stale if upload.is_pending),
        cleared=tuple(upload_id for upload_id, totals in held.items() if totals.count),
        forgotten=tuple(upload.id for upload in stale if upload.created_at < forget_before),
        bytes=sum(totals.bytes for totals in held.values()),
    )
    failed: list[str] = []
    for upload in () if dry_run else stale:
        try:
            closed = store.uploads.close(upload.id, UploadStatus.EXPIRED) if upload.is_pending else upload
            _clear(closed, store, files)
            if upload.id in report.forgotten:
                store.uploads.delete(upload.id)
        except StateConflict:
            continue  # completed at this moment
        except StorageFailure:
            failed.append(upload.id)
    return replace(report, failed=tuple(failed))


def _repeat(upload: Upload, wanted: Completion, ports: UploadPorts) -> tuple[Upload, File]:
    check_md5(wanted.md5, upload.md5)
    _clear_if_possible(upload, ports)  # a kill behind the completion may have left the parts
    return upload, find_file(upload.file_id or "", ports.store, ports.clock())


def _publish(
    upload: Upload,
    parts: Sequence[UploadPart],
    wanted: Completion,
    claim: Claim | None,
    ports: UploadPorts,
    go_on: Callable[[], None],
) -> tuple[Upload, File]:
    """Write the file and make it visible. Raises NotFound when the parts go meanwhile, StateConflict when the upload
    does not stay this attempt's."""
    file_id = new_file_id(ports.randomness)
    before = ports.store.uploads.begin_completion(upload.id, file_id)
    if before is not None:
        ports.files.delete(before)  # of an attempt that was killed, or that has lost the upload with our begin
    stored = ports.files.create(file_id)
    try:
        md5 = _join(parts, stored, ports.files, go_on)
        check_md5(wanted.md5, md5)
        file = _describe(upload, file_id, stored.commit(), int(ports.clock()))
        failpoint("joined", upload.id)
        done = ports.store.uploads.complete(upload.id, file, wanted.part_ids, md5, claim=claim)
    except BaseException:
        stored.discard()
        with suppress(StorageFailure):
            discard_unregistered(file_id, ports.store, ports.files)
        raise
    _clear_if_possible(done, ports)
    return done, file


def _join(parts: Sequence[UploadPart], stored: StoredFile, files: FileStore, go_on: Callable[[], None]) -> str:
    """Append the parts to `stored`, a block at a time. Returns the MD5 of all of them."""
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts:
        with files.parts.open(part.upload_id, part.id) as reader:
            while block := reader.read(JOIN_BLOCK_BYTES):
                go_on()
                digest.update(block)
                stored.write(block)
                failpoint("joining", part.upload_id)
    return digest.hexdigest()


def _describe(upload: Upload, file_id: str, contents: tuple[int, str], now: int) -> File:
    size, sha256 = contents
    if size != upload.bytes:
        raise StorageFailure(f"the parts of upload {upload.id} have lost bytes on the disk: send the file again")
    facts = FileFacts(upload.filename, upload.purpose, upload.expires_after)
    return File(
        id=file_id,
        bytes=size,
        created_at=now,
        filename=upload.filename,
        purpose=upload.purpose,
        sha256=sha256,
        expires_at=expires_at(facts, now),
        project_id=upload.project_id,
    )


def _close(upload: Upload, status: UploadStatus, ports: UploadPorts) -> Upload:
    """Close a pending upload and delete its parts. Returns what it has become, also when somebody else was faster."""
    try:
        closed = ports.store.uploads.close(upload.id, status)
    except StateConflict:
        return ports.store.uploads.get(upload.id)
    _clear_if_possible(closed, ports)
    return closed


def _clear_if_possible(upload: Upload, ports: UploadPorts) -> None:
    """The call has done its work; what it cannot remove waits for the next sweep."""
    with suppress(StorageFailure):
        _clear(upload, ports.store, ports.files)


def _clear(upload: Upload, store: BatchStore, files: FileStore) -> None:
    """Delete what a closed upload no longer needs. The records go last: they are what a sweep finds it by."""
    files.parts.delete(upload.id)
    if upload.file_id is not None and upload.status is not UploadStatus.COMPLETED:
        files.delete(upload.file_id)
    store.uploads.drop_parts(upload.id)
