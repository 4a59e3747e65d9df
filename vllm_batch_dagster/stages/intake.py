"""The door of the data path: bytes in, a stored File out; parameters in, a Batch in `validating` out.

Called by the API, which pushes blocks as they come, and by whoever has a stream (drop folder, command line).
Everything is durable before it returns: contents first, then the record that makes them visible.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress

from vllm_batch_dagster.core.claims import ClaimKey, claim_batch, claim_file
from vllm_batch_dagster.core.creation import (
    FileFacts,
    Randomness,
    clean_filename,
    expires_at,
    make_batch,
    new_batch_id,
    new_file_id,
    read_batch_params,
)
from vllm_batch_dagster.core.errors import InvalidInput, NotFound, StateConflict, StorageFailure
from vllm_batch_dagster.core.limits import StorageRoom
from vllm_batch_dagster.core.models import DEFAULT_PROJECT, Batch, File, Page
from vllm_batch_dagster.core.ports import BatchStore, Clock, FileStore
from vllm_batch_dagster.core.states import BatchEvent, BatchStatus
from vllm_batch_dagster.core.webhook_params import check_batch_webhook
from vllm_batch_dagster.core.webhook_urls import NO_HOSTS, AllowedHosts
from vllm_batch_dagster.core.windows import WindowRule

FILE_TOO_LARGE = "file_too_large"
LIST_PAGE = 1_000


class FileReceipt:
    """A file that is arriving. `write` its bytes, then `finish`; `abandon` leaves nothing behind.

    `max_bytes` 0 means no limit, and so does `room` None. Not thread-safe: one caller at a time.
    """

    def __init__(
        self, files: FileStore, randomness: Randomness, max_bytes: int = 0, room: StorageRoom | None = None
    ) -> None:
        self._files, self._room = files, room
        self._id = new_file_id(randomness)
        self._stored = files.create(self._id)
        self._limit = max_bytes
        self._size = 0

    def write(self, data: bytes | bytearray) -> None:
        """Raises InvalidInput (file_too_large) past `max_bytes`, StorageFailure when the disk refuses."""
        self._size += len(data)
        if 0 < self._limit < self._size:
            raise file_too_large(self._limit)
        if self._room is not None:
            self._room.check(self._size)
        self._stored.write(data)

    @property
    def id(self) -> str:
        return self._id

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._size

    def finish(self, facts: FileFacts, store: BatchStore, clock: Clock, claim_key: ClaimKey | None = None) -> File:
        """Make the contents durable, then record them. When the claim has its file already, that one is returned and
        these bytes are removed. Raises StorageFailure, ClaimConflict."""
        size, digest = self._stored.commit()
        created_at = int(clock())
        file = File(
            id=self._id,
            bytes=size,
            created_at=created_at,
            filename=clean_filename(facts.filename),
            purpose=facts.purpose,
            sha256=digest,
            expires_at=expires_at(facts, created_at),
            project_id=facts.project_id,
        )
        try:
            kept = store.files.add(file, claim=claim_file(claim_key, facts, digest) if claim_key else None)
        except BaseException:
            with suppress(StorageFailure):
                discard_unregistered(self._id, store, self._files)
            raise
        if kept != file.id:
            self._files.delete(file.id)
            return store.files.get(kept)
        return file

    def abandon(self) -> None:
        """Remove what has arrived. Harmless after `finish`."""
        self._stored.discard()


def discard_unregistered(file_id: str, store: BatchStore, files: FileStore) -> None:
    """Delete the contents of a file unless the store has a record of it: its reply may have been lost on the way.

    Raises StorageFailure when the store cannot say; then the contents stay.
    """
    try:
        store.files.get(file_id)
    except NotFound:
        files.delete(file_id)


def file_too_large(max_bytes: int, param: str = "file") -> InvalidInput:
    return InvalidInput(
        f"The file is larger than the {max_bytes} bytes that this server takes. Split it, or raise MAX_FILE_BYTES.",
        param=param,
        code=FILE_TOO_LARGE,
    )


def receive_file(
    blocks: Iterable[bytes],
    facts: FileFacts,
    *,
    store: BatchStore,
    files: FileStore,
    clock: Clock,
    randomness: Randomness,
    max_bytes: int = 0,
) -> File:
    """Store a whole stream as one file. On any error nothing is left. Raises InvalidInput, StorageFailure."""
    receipt = FileReceipt(files, randomness, max_bytes)
    try:
        for block in blocks:
            receipt.write(block)
        return receipt.finish(facts, store, clock)
    except BaseException:
        receipt.abandon()
        raise


def find_file(file_id: str, store: BatchStore, now: float, project_id: str | None = None) -> File:
    """Return the file. Raises NotFound, also for one that has expired or belongs to another project."""
    file = store.files.get(file_id, project_id=project_id)
    if not _is_live(file, now):
        raise NotFound("file", file_id)
    return file


def list_files(
    store: BatchStore,
    now: float,
    *,
    purpose: str | None,
    after: str | None,
    limit: int,
    order: str,
    project_id: str | None = None,
) -> Page[File]:
    """Return a page without expired files: always full when more follow, so that no client stops early.

    Raises NotFound for an unknown `after`.
    """
    live: list[File] = []
    for file in _every_file(store, purpose, after, order, min(limit + 1, LIST_PAGE), project_id):
        if _is_live(file, now):
            live.append(file)
        if len(live) > limit:
            break
    return Page(tuple(live[:limit]), has_more=len(live) > limit)


def delete_file(file_id: str, store: BatchStore, files: FileStore, now: float) -> File:
    """Delete record and contents. Raises NotFound, and StateConflict while an open batch reads the file."""
    file = find_file(file_id, store, now)
    for batch in store.batches.open():
        # A batch of another project that names this file does not read it: its validation fails.
        is_reader = batch.input_file_id == file_id and batch.project_id == file.project_id
        if is_reader and not batch.is_terminal:
            raise StateConflict(
                f"File {file_id} is the input of batch {batch.id}, which is {batch.status.value}. "
                "Cancel the batch or wait until it has finished, then delete the file."
            )
    store.files.delete(file_id)
    files.delete(file_id)
    return file


def create_batch(
    params: Mapping[str, object],
    store: BatchStore,
    clock: Clock,
    randomness: Randomness,
    *,
    project_id: str = DEFAULT_PROJECT,
    windows: WindowRule = WindowRule.OPENAI,
    webhook_hosts: AllowedHosts = NO_HOSTS,
    claim_key: ClaimKey | None = None,
    on_repeat: Callable[[], None] = lambda: None,
) -> Batch:
    """Store a new batch in `validating`. When `claim_key` has made one of the same parameters before, that one is
    returned, and `on_repeat` called. Raises InvalidInput for a wrong parameter, ClaimConflict.

    An input file that does not exist is not an error here: validation fails the batch, as OpenAI does (C.1).
    """
    checked = read_batch_params(params, windows)
    check_batch_webhook(checked.metadata, webhook_hosts)
    batch = make_batch(checked, new_batch_id(randomness), int(clock()), project_id)
    kept = store.batches.add(batch, claim=claim_batch(claim_key, params) if claim_key else None)
    if kept != batch.id:
        on_repeat()
        return store.batches.get(kept)
    return batch


def cancel_batch(batch_id: str, store: BatchStore, clock: Clock) -> Batch:
    """Ask an open batch to stop. One that is stopping or stopped already is returned as it is (C.5).

    Raises NotFound, and StateConflict for the other terminal states.
    """
    batch = store.batches.get(batch_id)
    if not _is_cancelled(batch):
        try:
            return store.batches.advance(batch_id, BatchEvent.CANCEL, int(clock()))
        except StateConflict:
            batch = store.batches.get(batch_id)
    if not _is_cancelled(batch):
        raise StateConflict(f"Cannot cancel a batch with status '{batch.status.value}'.")
    return batch


def _every_file(
    store: BatchStore, purpose: str | None, after: str | None, order: str, size: int, project_id: str | None
) -> Iterator[File]:
    page = store.files.list(purpose=purpose, after=after, limit=size, order=order, project_id=project_id)
    yield from page.data
    while page.has_more and page.data:
        after = page.data[-1].id
        page = store.files.list(purpose=purpose, after=after, limit=size, order=order, project_id=project_id)
        yield from page.data


def _is_live(file: File, now: float) -> bool:
    return file.expires_at is None or now < file.expires_at


def _is_cancelled(batch: Batch) -> bool:
    return batch.status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED)
